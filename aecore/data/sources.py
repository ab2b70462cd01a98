"""Where images come from: each dataset's name, and how its images are found and split."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from aecore.config import Data
from aecore.data import fashion_mnist, files, whole
from aecore.data.crops import Crop, Crops, central
from aecore.data.indexed import ArraySource, Cache, Pairs, Shape, Source
from aecore.errors import DataError


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images for training and for validation."""

    train: Source
    validation: Source
    crop: Crop | None = None
    """How training takes crops of them; None: it takes whole images, which are of one size."""

    @property
    def image_shape(self) -> Shape:
        """Height, width and channels of what training sees; of pairs, of the originals."""
        if self.crop is None:
            return self.train.shape(0)
        return (*self.crop.size, self.train.channels)

    @property
    def scale(self) -> int:
        """How many times larger than the degraded pictures the originals are, where both exist."""
        return self.train.scale if isinstance(self.train, Pairs) else 1

    def examples(self, grid: int = 1) -> np.ndarray | Crops:
        """What training takes batches from. Its length is the number of examples in an epoch.

        Args:
          grid: crops start at multiples of it, in pixels.

        Returns:
          `(N, H, W, C)` uint8 images, or crops.
        """
        if self.crop is None:
            return whole_array(self.train)
        return Crops(self.train, self.crop, grid)

    def to_validate(self) -> np.ndarray | Source:
        """What training is validated on: whole images, `(N, H, W, C)` uint8, or pictures."""
        return whole_array(self.validation) if self.crop is None else self.validation

    def samples(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Some images for validation, of the size that training sees.

        Args:
          count: how many at most.

        Returns:
          `(n, ., ., C)` uint8: what is to be degraded, and the originals. They differ for pairs.
        """
        if self.crop is None:
            images = whole_array(self.validation)[:count]
            return images, images
        cut = central(self.validation, self.crop.size, count)
        return cut[0], cut[-1]

    def fingerprint(self) -> str:
        """Tells whether two datasets hold the same images in the same order."""
        crc = self.validation.checksum(self.train.checksum(0))
        shape = f"x{self.image_shape}" if self.crop is None else ""
        return f"{len(self.train)}+{len(self.validation)}{shape}:{crc:08x}"


def whole_array(source: Source) -> np.ndarray:
    """The images of a source in one array, `(N, H, W, C)` uint8.

    Raises:
      DataError: they are not held in one, as photographs of several sizes aren't.
    """
    if not isinstance(source, ArraySource):
        raise DataError(
            "the images may differ in size, but this needs one size; "
            "use --data.image-size HEIGHT WIDTH"
        )
    return source.array


def load(data: Data, *, progress: bool = True) -> Dataset:
    """Finds a dataset's images and splits them.

    Without `data.crop` all images are decoded, at one size. With it, they are at their own sizes,
    and those in files are decoded when they are needed.

    Args:
      data: says which.
      progress: whether to show a progress bar on stderr where decoding takes long.

    Raises:
      DataError: the dataset is unknown, missing, damaged or empty; or its images differ in size
        while `data.crop` and `data.image_size` are None.
    """
    crop = None
    if data.crop_size is not None:
        crop = Crop(data.crop_size, data.crops_per_image, data.small, data.turn)
    if data.dataset == "sample":
        dataset = _of_arrays(fashion_mnist.sample(), data)
    elif data.dataset == "fashion_mnist" and (paths := fashion_mnist.idx_paths(data)):
        dataset = _of_arrays([fashion_mnist.read_idx(path) for path in paths], data)
    elif crop is None:
        dataset = _of_arrays(whole.decode(files.whole_pictures(data), data, progress), data)
    else:
        dataset = _split(data)
    if not (len(dataset.train) and len(dataset.validation)):
        raise DataError(
            f"{data.dataset} has {len(dataset.train)} images for training and "
            f"{len(dataset.validation)} for validation; it needs some of both"
        )
    return dataclasses.replace(dataset, crop=crop)


def pictures(data: Data) -> Source:
    """All pictures of a folder, or of pairs of folders, at their own sizes, ordered by name.

    For scoring a network on pictures that it was not trained on. Of other datasets, the images for
    validation.

    Raises:
      DataError: as for `load`.
    """
    if data.dataset in ("folder", "pairs"):
        found = files.find(data)
        everything = range(len(found.original))
        return found.source(everything, data, Cache(whole.memory_limit(data)))
    return load(data).validation


def _of_arrays(arrays: Sequence[np.ndarray], data: Data) -> Dataset:
    train, validation = arrays
    train, validation = whole.resize(train, validation, data)
    return Dataset(ArraySource(train), ArraySource(validation))


def _split(data: Data) -> Dataset:
    found = files.find(data)
    count = len(found.original)
    is_train = found.is_train
    if is_train is None:
        is_train = whole.split(found.groups or range(count), np.ones(count, bool), data)
    cache = Cache(whole.memory_limit(data))
    return Dataset(
        found.source(np.flatnonzero(is_train), data, cache),
        found.source(np.flatnonzero(~is_train), data, cache),
    )
