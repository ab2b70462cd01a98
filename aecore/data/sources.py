"""Images by index in, deterministic batches out; the only module that imports TensorFlow.

A dataset is a uint8 array `(N, H, W, C)` at working size. Order and noise are functions of
`(seed, epoch)` and `(seed, step)`, so that batches can start at any step without reading what
comes before it.
"""

import gzip
import itertools
import logging
import os
import socket
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from tqdm import tqdm

from aecore.config import Data
from aecore.data.tensorflow import import_tensorflow
from aecore.errors import DataError, ImageError
from aecore.media import images

_log = logging.getLogger(__name__)

_SAMPLE = epath.Path(__file__).parent / "sample" / "fashion_mnist.npz"
_DEBIAN_FASHION_MNIST = epath.Path("/usr/share/datasets/fashion-mnist")
_IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


class Dataset(NamedTuple):
    """Training and validation images, each `(N, H, W, C)` uint8."""

    train: np.ndarray
    validation: np.ndarray

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.train.shape[1:]

    def fingerprint(self) -> str:
        """Tells whether two datasets hold the same images in the same order."""
        crc = 0
        for array in self:
            for start in range(0, len(array), 4096):
                crc = zlib.crc32(np.ascontiguousarray(array[start : start + 4096]), crc)
        return f"{len(self.train)}+{len(self.validation)}x{self.image_shape}:{crc:08x}"


class _Pictures(NamedTuple):
    """Pictures before they are brought to working size."""

    count: int
    read: Callable[[], Iterable[Sequence[epath.Path | np.ndarray]]]
    """Yields runs of pictures, in order; each is a file, or `(H, W, C)` uint8. Where all have one
    size, a run may be one array."""
    shape: tuple[int | None, int | None, int]
    """Their height, width and channels; None where they differ."""
    is_train: np.ndarray | None
    """`(N,)` bool where the source has its own split, else None."""
    groups: Sequence[Any] | None = None
    """What must not be divided between training and validation, such as people; None: nothing."""


_RUN = 64
"""Pictures that are read, decoded and counted together."""


def _runs(pictures: Iterable[Any]) -> Iterator[Sequence[Any]]:
    pictures = iter(pictures)
    while run := list(itertools.islice(pictures, _RUN)):
        yield run


def load(data: Data) -> Dataset:
    """Loads a dataset at working size.

    Raises:
      DataError: the source is unknown, missing, damaged or empty, or its images' sizes differ
        while `data.image_size` is None.
    """
    sources = {"sample": _sample, "fashion_mnist": _fashion_mnist, "folder": _folder}
    source = sources.get(data.dataset, _tfds)(data)
    dataset = (_decode if isinstance(source, _Pictures) else _resize_arrays)(source, data)
    if not all(map(len, dataset)):
        raise DataError(
            f"{data.dataset} has {len(dataset.train)} images for training and "
            f"{len(dataset.validation)} for validation; it needs some of both"
        )
    return dataset


# ---- Sources


def _sample(data: Data) -> Dataset:
    with _SAMPLE.open("rb") as file, np.load(file) as arrays:
        return Dataset(arrays["train"][..., None], arrays["validation"][..., None])


def _fashion_mnist(data: Data) -> Dataset | _Pictures:
    folder = epath.Path(data.data_dir or _DEBIAN_FASHION_MNIST)
    paths = [_idx_path(folder, name) for name in _IDX_FILES]
    if all(paths) and (data.data_dir or not _is_prepared("fashion_mnist")):
        return Dataset(*map(_read_idx, paths))
    return _tfds(data)


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


def _folder(data: Data) -> _Pictures:
    if data.data_dir is None:
        raise DataError("dataset folder needs a folder of pictures: use --data.data-dir DIR")
    folder = epath.Path(data.data_dir)
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; use --data.data-dir DIR")
    shapes = {}
    for path in tqdm(images.walk(folder), "looking at pictures", unit="", delay=2, leave=False):
        try:
            shapes[path] = images.read_shape(path)
        except ImageError as error:
            _log.warning("skipped: %s", error)
    if not shapes:
        raise DataError(f"{folder} holds no pictures; use --data.data-dir with a folder of some")
    heights, widths, channels = (set(values) for values in zip(*shapes.values(), strict=True))
    readable = list(shapes)
    return _Pictures(
        count=len(readable),
        read=lambda: _runs(readable),
        shape=(
            heights.pop() if len(heights) == 1 else None,
            widths.pop() if len(widths) == 1 else None,
            max(channels),
        ),
        is_train=None,
    )


def _tfds(data: Data) -> _Pictures:
    tf, tfds = import_tensorflow(), _import_tfds()
    try:
        builder = tfds.builder(data.dataset, data_dir=data.data_dir)
    except Exception as error:  # Names that TFDS can't parse fail in many ways.
        # The message of this one lists every dataset there is.
        is_listing = isinstance(error, tfds.core.registered.DatasetNotFoundError)
        raise DataError(
            f"unknown dataset {data.dataset!r}{'' if is_listing else f' ({error!s:.200})'}; "
            "use sample, fashion_mnist, lfw, folder, or the name of a TFDS dataset "
            "(https://www.tensorflow.org/datasets/catalog)"
        ) from error
    if not builder.is_prepared():
        _prepare(builder, data)
    features = builder.info.features
    if not (isinstance(features, tfds.features.FeaturesDict) and "image" in features):
        raise DataError(f"TFDS dataset {data.dataset} has no images: {features}")

    splits = [name for name in ("train", "test", "validation") if name in builder.info.splits]
    # One held-out split is enough; `test` where there are both, as benchmarks report that one.
    splits = splits[:2] or list(builder.info.splits)[:1]
    counts = [builder.info.splits[name].num_examples for name in splits]

    def read(feature: str) -> Iterator[Sequence[Any]]:
        try:
            for split in splits:
                dataset = builder.as_dataset(
                    split=split,
                    decoders=tfds.decode.PartialDecoding({feature: True}),
                    shuffle_files=False,
                    # It is read once, and a copy in TensorFlow's memory would be too many.
                    read_config=tfds.ReadConfig(try_autocache=False),
                )
                if None in features[feature].shape:
                    yield from _runs(example[feature] for example in dataset.as_numpy_iterator())
                else:  # Each turn of the iterator is slow, whatever it brings.
                    yield from (e[feature] for e in dataset.batch(_RUN).as_numpy_iterator())
        except tf.errors.OpError as error:
            raise DataError(f"{builder.data_dir} is damaged: {error.message}") from error

    if features["image"].np_dtype != np.uint8:
        raise DataError(f"TFDS dataset {data.dataset} has images of {features['image'].np_dtype}")
    height, width, channels = features["image"].shape
    # LFW labels an image with its person's name.
    people = builder.name == "lfw"
    return _Pictures(
        count=sum(counts),
        read=lambda: read("image"),
        shape=(height, width, 1 if channels == 1 else 3),
        is_train=np.repeat([True, False], counts) if len(counts) == 2 else None,
        groups=list(itertools.chain.from_iterable(read("label"))) if people else None,
    )


def _is_prepared(name: str) -> bool:
    """Whether TFDS, if it is installed, has a dataset in its own folder."""
    try:
        return _import_tfds().builder(name).is_prepared()
    except DataError:
        return False


def _prepare(builder: Any, data: Data) -> None:
    """Downloads a TFDS dataset, or says at once that there is no network."""
    where = builder.data_dir
    try:
        # TFDS itself retries for minutes before it reports that it has no network.
        if not urllib.request.getproxies():
            socket.create_connection(("storage.googleapis.com", 443), timeout=10).close()
        builder.download_and_prepare()
    except Exception as error:  # TFDS lets through whatever its downloads and parsers raise.
        idx = (
            f", or install Debian's package dataset-fashion-mnist, or name a folder of "
            f"{_IDX_FILES[0]} and {_IDX_FILES[1]} (also .gz) with --data.data-dir"
            if data.dataset == "fashion_mnist"
            else ""
        )
        raise DataError(
            f"{data.dataset} is not prepared in {where} and can't be downloaded ({error}); "
            f"name the folder of prepared TFDS data with --data.data-dir{idx}, or prepare it "
            f"where there is a network: tfds build {data.dataset} --data_dir DIR; "
            "--data.dataset sample needs neither"
        ) from error


def _import_tfds():
    import_tensorflow()
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"this dataset is read with tensorflow-datasets, which can't be imported ({error}); "
            "install it, or use --data.dataset folder or sample"
        ) from error
    return tensorflow_datasets


# ---- Working size


def _working_shape(shape: tuple[int | None, int | None, int], data: Data) -> tuple[int, int, int]:
    height, width = data.image_size or shape[:2]
    if height is None or width is None:
        raise DataError("the images differ in size; choose one with --data.image-size HEIGHT WIDTH")
    return height, width, data.channels or shape[2]


def _decode(source: _Pictures, data: Data) -> Dataset:
    """Decodes in parallel, skipping broken pictures, and splits."""
    shape = _working_shape(source.shape, data)
    array = _allocate((source.count, *shape), data.memory_limit)
    good = np.zeros(len(array), bool)

    def decode(index: int, content: epath.Path | np.ndarray) -> None:
        try:
            if isinstance(content, np.ndarray):
                picture = images.from_array(content)
            else:
                picture = images.read(content)
            array[index] = images.at_working_size(picture, shape[:2], shape[2], data.resize)
            good[index] = True
        except ImageError as error:
            named = isinstance(content, np.ndarray) or str(content) in str(error)
            _log.warning("skipped: %s", error if named else f"{content}: {error}")

    # Pillow releases the interpreter's lock while it decodes and resizes.
    with (
        ThreadPoolExecutor() as pool,
        tqdm(desc=f"decoding {data.dataset}", total=len(array), delay=2, leave=False) as bar,
    ):
        stop = 0
        for run in source.read():
            place = slice(stop, stop := stop + len(run))
            if isinstance(run, np.ndarray) and run.shape[1:] == shape:
                array[place], good[place] = run, True
            else:
                list(pool.map(decode, range(place.start, place.stop), run))
            bar.update(len(run))

    if not good.any():
        raise DataError(f"none of the {len(array)} pictures of {data.dataset} can be decoded")
    is_train = source.is_train
    if is_train is None:
        is_train = _split(source.groups or range(len(array)), good, data)
    return Dataset(_select(array, good & is_train), _select(array, good & ~is_train))


def _resize_arrays(dataset: Dataset, data: Data) -> Dataset:
    if dataset.validation.shape[1:] != dataset.image_shape:
        raise DataError(
            f"the training images are {dataset.image_shape}, those for validation "
            f"{dataset.validation.shape[1:]}"
        )
    shape = _working_shape(dataset.image_shape, data)
    if shape == dataset.image_shape:
        return dataset

    def resize(array: np.ndarray) -> np.ndarray:
        resized = _allocate((len(array), *shape), data.memory_limit)
        for index, image in enumerate(array):
            picture = images.from_array(image)
            resized[index] = images.at_working_size(picture, shape[:2], shape[2], data.resize)
        return resized

    return Dataset(*map(resize, dataset))


def _allocate(shape: tuple[int, ...], memory_limit: float | None) -> np.ndarray:
    """A uint8 array in memory, or in a temporary file that vanishes with it."""
    size = int(np.prod(shape, dtype=np.int64))
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # A quarter, as the parts of a dataset, and then TensorFlow, hold a copy each.
    limit = physical / 4 if memory_limit is None else memory_limit * 2**30
    if size <= limit:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _select(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`array[mask]`, in a file where the array is in one."""
    if mask.all():
        return array
    if not isinstance(array, np.memmap):
        return array[mask]
    selected = _allocate((int(mask.sum()), *array.shape[1:]), memory_limit=0)
    for target, index in enumerate(np.flatnonzero(mask)):
        selected[target] = array[index]
    return selected


def _split(groups: Sequence[Any], good: np.ndarray, data: Data) -> np.ndarray:
    """`(N,)` bool: which images are for training. No group is on both sides."""
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    order = np.random.Generator(np.random.Philox(data.split_seed)).permutation(len(names))
    sizes = np.bincount(group, weights=good, minlength=len(names))[order]
    wanted = max(1.0, data.validation_fraction * good.sum())
    held_out = order[np.cumsum(sizes) - sizes < wanted]
    is_train = ~np.isin(group, held_out)
    if not (good & is_train).any():
        raise DataError(
            f"{int(good.sum())} image(s) can't be split into training and validation; add more"
        )
    return is_train
