"""Fashion-MNIST where TFDS has not prepared it: the shipped sample, and files in MNIST's format."""

import gzip
import zlib

import numpy as np
from etils import epath

from aecore.config import Data
from aecore.data import tfds
from aecore.errors import DataError
from aecore.storage import to_path

IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
"""Names of the files for training and for validation."""

_SAMPLE = epath.Path(__file__).parent / "sample" / "fashion_mnist.npz"
_DEBIAN_FASHION_MNIST = epath.Path("/usr/share/datasets/fashion-mnist")


def sample() -> list[np.ndarray]:
    with _SAMPLE.open("rb") as file, np.load(file) as arrays:
        return [arrays[name][..., None] for name in ("train", "validation")]


def idx_paths(data: Data) -> list[epath.Path] | None:
    """Fashion-MNIST's files, if they are to be used."""
    folder = to_path(data.data_dir or _DEBIAN_FASHION_MNIST)
    paths = [path for name in IDX_FILES if (path := _idx_path(folder, name))]
    if len(paths) == len(IDX_FILES) and (data.data_dir or not tfds.is_prepared("fashion_mnist")):
        return paths
    return None


def read_idx(path: epath.Path) -> np.ndarray:
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


def _idx_path(folder: epath.Path, name: str) -> epath.Path | None:
    paths = (folder / name, folder / f"{name}.gz")
    return next((path for path in paths if path.exists()), None)
