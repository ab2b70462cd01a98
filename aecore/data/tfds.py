"""Images of datasets that TensorFlow Datasets (TFDS) has prepared, or can download."""

import functools
import itertools
import socket
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from aecore.config import Data
from aecore.data import whole
from aecore.data.indexed import Encoded
from aecore.data.tensorflow import import_tensorflow, untuned
from aecore.errors import DataError

RUN = 64
"""Pictures that are read, decoded and counted together."""


def runs(pictures: Iterable[Any]) -> Iterator[Sequence[Any]]:
    """Divides pictures into runs of `RUN`."""
    pictures = iter(pictures)
    while run := list(itertools.islice(pictures, RUN)):
        yield run


class Prepared:
    """A prepared dataset's images, in the order of its splits.

    Args:
      data: which dataset, and where it is.
      idx_hint: what else to suggest where it can't be prepared.

    Raises:
      DataError: there is none of that name, it has no uint8 images, or it is not prepared and
        can't be downloaded.
    """

    def __init__(self, data: Data, idx_hint: str = ""):
        tfds = _import_tfds()
        self._builder = builder = _builder(data)
        if not builder.is_prepared():
            _prepare(builder, data, idx_hint)
        self._features = features = builder.info.features
        if not (isinstance(features, tfds.features.FeaturesDict) and "image" in features):
            raise DataError(f"TFDS dataset {data.dataset} has no images: {features}")
        if features["image"].np_dtype != np.uint8:
            raise DataError(
                f"TFDS dataset {data.dataset} has images of {features['image'].np_dtype}; "
                "use one of uint8"
            )
        splits = [name for name in ("train", "test", "validation") if name in builder.info.splits]
        # One held-out split is enough; `test` where there are both, as benchmarks report that one.
        self._splits = splits[:2] or list(builder.info.splits)[:1]
        self._counts = [builder.info.splits[name].num_examples for name in self._splits]
        self._random_access = builder.info.file_format.value == "array_record"

    @property
    def is_train(self) -> np.ndarray | None:
        """`(N,)` bool; None: the dataset has no split of its own."""
        return np.repeat([True, False], self._counts) if len(self._counts) == 2 else None

    @property
    def groups(self) -> Sequence[Any] | None:
        """What must not be divided between training and validation, such as people."""
        # LFW labels an image with its person's name.
        if self._builder.name != "lfw":
            return None
        return list(itertools.chain.from_iterable(self._read("label")))

    def pictures(self) -> whole.Pictures:
        """The images, to be brought to one size."""
        height, width, channels = self._features["image"].shape
        return whole.Pictures(
            count=sum(self._counts),
            read=functools.partial(self._read, "image"),
            shape=(height, width, 1 if channels == 1 else 3),
            is_train=self.is_train,
            groups=self.groups,
        )

    def files(self, limit: float) -> list[Encoded]:
        """The images as files, to be decoded when they are needed.

        Datasets in TFDS's format ArrayRecord are read when a picture is decoded. Others can't be
        read by index, and are read into memory at once, as they are, encoded.

        Args:
          limit: how many bytes may be in memory.
        """
        if self._random_access:
            return list(self._records())
        size = sum(self._builder.info.splits[name].num_bytes for name in self._splits)
        if size > limit:
            raise DataError(
                f"{self._builder.data_dir} has {size / 2**30:.1f} GiB, which can't be read by "
                "index; prepare it with tfds build --file_format=array_record, or raise "
                "--data.memory-limit"
            )
        return [
            Encoded(f"tfds://{self.name}/{index}", functools.partial(bytes, content))
            for index, content in enumerate(
                itertools.chain.from_iterable(self._read("image", decoded=False))
            )
        ]

    @property
    def name(self) -> str:
        """The dataset's name, configuration and version."""
        return self._builder.info.full_name

    def _records(self) -> Iterator[Encoded]:
        for split, source in self._by_index():
            for index in range(len(source)):
                name = f"tfds://{self.name}/{split}/{index}"
                yield Encoded(name, functools.partial(_image_of, source, index))

    def _by_index(self) -> Iterator[tuple[str, Sequence[Any]]]:
        """For each split, examples that can be read by index, images encoded."""
        decoders = {"image": _import_tfds().decode.SkipDecoding()}
        for split in self._splits:
            yield split, self._builder.as_data_source(split=split, decoders=decoders)

    def _read(self, feature: str, *, decoded: bool = True) -> Iterator[Sequence[Any]]:
        """Runs of the values that one feature has, in order."""
        if not self._random_access:
            yield from self._read_in_order(feature, decoded)
        elif feature == "image":
            yield from runs(self._records())
        else:
            for _, source in self._by_index():
                yield [example[feature] for example in source]

    def _read_in_order(self, feature: str, decoded: bool) -> Iterator[Sequence[Any]]:
        tf, tfds = import_tensorflow(), _import_tfds()
        try:
            for split in self._splits:
                read = self._builder.as_dataset(
                    split=split,
                    decoders=tfds.decode.PartialDecoding(
                        {feature: True},
                        decoders=None if decoded else {feature: tfds.decode.SkipDecoding()},
                    ),
                    shuffle_files=False,
                    # It is read once, and a copy in TensorFlow's memory would be too many.
                    read_config=tfds.ReadConfig(try_autocache=False),
                )
                dataset = untuned(read)
                if decoded and None not in self._features[feature].shape:
                    # Each turn of the iterator is slow, whatever it brings.
                    yield from (e[feature] for e in dataset.batch(RUN).as_numpy_iterator())
                else:
                    yield from runs(example[feature] for example in dataset.as_numpy_iterator())
        except tf.errors.OpError as error:
            raise DataError(f"{self._builder.data_dir} is damaged: {error.message}") from error


def _image_of(source: Any, index: int) -> bytes:
    return source[index]["image"]


def is_prepared(name: str) -> bool:
    """Whether TFDS, if it is installed, has a dataset in its own folder."""
    try:
        return _import_tfds().builder(name).is_prepared()
    except DataError:
        return False


def _builder(data: Data) -> Any:
    tfds = _import_tfds()
    try:
        return tfds.builder(data.dataset, data_dir=data.data_dir)
    except Exception as error:  # Names that TFDS can't parse fail in many ways.
        # The message of this one lists every dataset there is.
        is_listing = isinstance(error, tfds.core.registered.DatasetNotFoundError)
        raise DataError(
            f"unknown dataset {data.dataset!r}{'' if is_listing else f' ({error!s:.200})'}; "
            "use sample, fashion_mnist, lfw, folder, pairs, or the name of a TFDS dataset "
            "(https://www.tensorflow.org/datasets/catalog)"
        ) from error


def _prepare(builder: Any, data: Data, idx_hint: str) -> None:
    """Downloads a TFDS dataset, or says at once that there is no network."""
    where = builder.data_dir
    try:
        # TFDS itself retries for minutes before it reports that it has no network.
        if not urllib.request.getproxies():
            socket.create_connection(("storage.googleapis.com", 443), timeout=10).close()
        builder.download_and_prepare()
    except Exception as error:  # TFDS lets through whatever its downloads and parsers raise.
        raise DataError(
            f"{data.dataset} is not prepared in {where} and can't be downloaded ({error}); "
            f"name the folder of prepared TFDS data with --data.data-dir{idx_hint}, or prepare it "
            f"where there is a network: tfds build {data.dataset} --data_dir DIR; "
            "--data.dataset sample needs neither"
        ) from error


def _import_tfds() -> Any:
    import_tensorflow()
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(
            f"this dataset is read with tensorflow-datasets, which can't be imported ({error}); "
            "install it, or use --data.dataset folder or sample"
        ) from error
    return tensorflow_datasets
