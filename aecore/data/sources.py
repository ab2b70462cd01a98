"""Where images come from: each dataset's name, and how its images are found and split."""

import dataclasses
import gzip
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from aecore.config import Data
from aecore.data import tfds, whole
from aecore.data.crops import Crop, Crops, central
from aecore.data.headers import readable_shapes
from aecore.data.indexed import ArraySource, Cache, FileSource, Pairs, Shape, Source, read_shape
from aecore.errors import DataError, ImageError
from aecore.media import images
from aecore.storage import to_path

_SAMPLE = epath.Path(__file__).parent / "sample" / "fashion_mnist.npz"
_DEBIAN_FASHION_MNIST = epath.Path("/usr/share/datasets/fashion-mnist")
_IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


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
        dataset = _of_arrays(_sample(), data)
    elif data.dataset == "fashion_mnist" and (paths := _idx_paths(data)):
        dataset = _of_arrays([_read_idx(path) for path in paths], data)
    elif crop is None:
        dataset = _of_arrays(whole.decode(_pictures(data), data, progress), data)
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
        files = _files(data)
        everything = range(len(files.original))
        return _source(files, everything, _scale(files), data, Cache(whole.memory_limit(data)))
    return load(data).validation


# ---- Datasets held in arrays


def _of_arrays(arrays: Sequence[np.ndarray], data: Data) -> Dataset:
    train, validation = arrays
    train, validation = whole.resize(train, validation, data)
    return Dataset(ArraySource(train), ArraySource(validation))


def _sample() -> list[np.ndarray]:
    with _SAMPLE.open("rb") as file, np.load(file) as arrays:
        return [arrays[name][..., None] for name in ("train", "validation")]


def _idx_paths(data: Data) -> list[epath.Path] | None:
    """Fashion-MNIST's files, if they are to be used."""
    folder = to_path(data.data_dir or _DEBIAN_FASHION_MNIST)
    paths = [path for name in _IDX_FILES if (path := _idx_path(folder, name))]
    if len(paths) == len(_IDX_FILES) and (data.data_dir or not tfds.is_prepared("fashion_mnist")):
        return paths
    return None


def _idx_path(folder: epath.Path, name: str) -> epath.Path | None:
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.exists()), None)


def _read_idx(path: epath.Path) -> np.ndarray:
    """Reads images in MNIST's IDX format: big-endian magic 2051, count, height, width, bytes."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        magic, count, height, width = np.frombuffer(content, ">i4", 4)
        if magic != 2051 or not count:
            raise ValueError(f"its magic number is {magic}, and it holds {count} images")
        return np.frombuffer(content, np.uint8, offset=16).reshape(count, height, width, 1)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{path} is not an IDX file of images: {error}") from error


# ---- Whole images, decoded at one size


def _pictures(data: Data) -> whole.Pictures:
    if data.dataset == "folder":
        return _folder_pictures(data)
    if data.dataset == "pairs":
        raise DataError("dataset pairs is trained on in crops: use --data.crop SIZE")
    return _prepared(data).pictures()


def _folder_pictures(data: Data) -> whole.Pictures:
    folder = _folder(data)
    files = images.walk(folder)
    found = readable_shapes(read_shape, files)
    shapes = dict(tqdm(found, "looking at pictures", len(files), unit="", delay=2, leave=False))
    if not shapes:
        raise _no_pictures(folder)
    heights, widths, channels = (set(values) for values in zip(*shapes.values(), strict=True))
    readable = list(shapes)
    return whole.Pictures(
        count=len(readable),
        read=lambda: tfds.runs(readable),
        shape=(
            heights.pop() if len(heights) == 1 else None,
            widths.pop() if len(widths) == 1 else None,
            max(channels),
        ),
        is_train=None,
    )


def _folder(data: Data) -> epath.Path:
    if data.data_dir is None:
        raise DataError(f"dataset {data.dataset} needs a folder: use --data.data-dir DIR")
    folder = to_path(data.data_dir)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; use --data.data-dir DIR")
    return folder


def _no_pictures(folder: epath.Path) -> DataError:
    return DataError(f"{folder} holds no pictures; name a folder that does")


def _prepared(data: Data) -> tfds.Prepared:
    hint = (
        f", or install Debian's package dataset-fashion-mnist, or name a folder of "
        f"{_IDX_FILES[0]} and {_IDX_FILES[1]} (also .gz) with --data.data-dir"
        if data.dataset == "fashion_mnist"
        else ""
    )
    return tfds.Prepared(data, hint)


# ---- Pictures in files, decoded when they are needed


@dataclasses.dataclass(frozen=True)
class _Files:
    """The pictures of a dataset, of which no file has been opened."""

    original: Sequence[Any]
    degraded: Sequence[Any] | None = None
    """Of pairs, the degraded pictures, in the same order."""
    is_train: np.ndarray | None = None
    """`(N,)` bool; None: the dataset has no split of its own."""
    groups: Sequence[Any] | None = None
    """What must not be divided between training and validation."""


def _split(data: Data) -> Dataset:
    files = _files(data)
    count = len(files.original)
    is_train = files.is_train
    if is_train is None:
        is_train = whole.split(files.groups or range(count), np.ones(count, bool), data)
    cache = Cache(whole.memory_limit(data))
    scale = _scale(files)
    return Dataset(
        _source(files, np.flatnonzero(is_train), scale, data, cache),
        _source(files, np.flatnonzero(~is_train), scale, data, cache),
    )


def _files(data: Data) -> _Files:
    if data.dataset == "folder":
        folder = _folder(data)
        found = _picture_files(folder)
        if not found:
            raise _no_pictures(folder)
        return _Files(found)
    if data.dataset == "pairs":
        return _pairs(_folder(data))
    prepared = _prepared(data)
    return _Files(
        prepared.files(whole.memory_limit(data)),
        is_train=prepared.is_train,
        groups=prepared.groups,
    )


def _picture_files(folder: epath.Path) -> list[epath.Path]:
    """Files whose ending is a picture's, in order of their names."""
    return [path for path in images.walk(folder) if path.suffix.lower() in images.SUFFIXES]


def _pairs(folder: epath.Path) -> _Files:
    """Finds pictures of the same name, whatever their ending, in `degraded` and `original`."""
    sides = ("degraded", "original")
    found: dict[str, dict[str, epath.Path]] = {side: {} for side in sides}
    problems = []
    for side in sides:
        if not (folder / side).is_dir():
            raise DataError(f"{folder} has no folder {side}; pairs are read from {side}")
        for path in _picture_files(folder / side):
            name = str(path.relative_to(folder / side).with_suffix(""))
            if name in found[side]:
                problems.append(f"{path} has the name of {found[side][name]}")
            found[side][name] = path
    for side, other in (sides, sides[::-1]):
        missing = sorted(found[side].keys() - found[other].keys())
        problems += [f"{found[side][name]} has no partner in {other}" for name in missing]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise DataError(
            f"{', '.join(problems[:5])}{more}; each picture of {folder} must be in degraded and "
            "in original, with the same name"
        )
    if not found["original"]:
        raise _no_pictures(folder)
    names = sorted(found["original"])
    return _Files(
        [found["original"][name] for name in names], [found["degraded"][name] for name in names]
    )


def _scale(files: _Files) -> int:
    """How many times larger the originals are, as the first pair that can be read tells."""
    for degraded, original in zip(files.degraded or (), files.original, strict=False):
        try:
            small, large = (read_shape(file)[:2] for file in (degraded, original))
        except ImageError:
            continue  # A warning names it when it is used.
        scale = large[0] // small[0]
        if large != (small[0] * scale, small[1] * scale) or not scale:
            raise DataError(
                f"{original} is {large[0]}x{large[1]}, {degraded} is {small[0]}x{small[1]}; the "
                "original's sides must be the same, or a whole number of times larger"
            )
        return scale
    return 1


def _source(
    files: _Files, indices: Sequence[int] | np.ndarray, scale: int, data: Data, cache: Cache
) -> Source:
    """The pictures at some indices."""

    def source(paths: Sequence[Any]) -> FileSource:
        return FileSource([paths[index] for index in indices], data.channels or 3, cache)

    if files.degraded is None:
        return source(files.original)
    return Pairs(source(files.degraded), source(files.original), scale)
