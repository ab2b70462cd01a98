"""Finds the pictures of datasets that lie in files."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from aecore.config import Data
from aecore.data import tfds, whole
from aecore.data.fashion_mnist import IDX_FILES
from aecore.data.headers import readable_shapes
from aecore.data.indexed import Cache, FileSource, Pairs, Source, read_shape
from aecore.errors import DataError, ImageError
from aecore.media import images
from aecore.storage import to_path


@dataclasses.dataclass(frozen=True)
class Files:
    """The pictures of a dataset, of which no file has been opened."""

    original: Sequence[Any]
    degraded: Sequence[Any] | None = None
    """Of pairs, the degraded pictures, in the same order."""
    is_train: np.ndarray | None = None
    """`(N,)` bool; None: the dataset has no split of its own."""
    groups: Sequence[Any] | None = None
    """What must not be divided between training and validation."""

    def source(self, indices: Sequence[int] | np.ndarray, data: Data, cache: Cache) -> Source:
        """The pictures at some indices, decoded when they are needed."""

        def of(paths: Sequence[Any]) -> FileSource:
            return FileSource([paths[index] for index in indices], data.channels or 3, cache)

        if self.degraded is None:
            return of(self.original)
        return Pairs(of(self.degraded), of(self.original), self._scale)

    @functools.cached_property
    def _scale(self) -> int:
        """How many times larger the originals are, as the first pair that can be read tells."""
        for degraded, original in zip(self.degraded or (), self.original, strict=True):
            try:
                small, large = (read_shape(file)[:2] for file in (degraded, original))
            except ImageError:
                continue  # A warning names it when it is used.
            scale = large[0] // small[0]
            if large != (small[0] * scale, small[1] * scale) or not scale:
                raise DataError(
                    f"{original} is {large[0]}x{large[1]}, {degraded} is {small[0]}x{small[1]}; "
                    "the original's sides must be the same, or a whole number of times larger"
                )
            return scale
        return 1


def find(data: Data) -> Files:
    """The pictures of a folder, of pairs of folders, or of a dataset that TFDS has prepared.

    Raises:
      DataError: there are none, or of pairs one lacks its partner.
    """
    if data.dataset == "folder":
        folder = _folder(data)
        found = picture_files(folder)
        if not found:
            raise _no_pictures(folder)
        return Files(found)
    if data.dataset == "pairs":
        return _pairs(_folder(data))
    prepared = _prepared(data)
    return Files(
        prepared.files(whole.memory_limit(data)),
        is_train=prepared.is_train,
        groups=prepared.groups,
    )


def whole_pictures(data: Data) -> whole.Pictures:
    """What `find` finds, to be decoded at one size.

    Raises:
      DataError: there are none, or they are pairs.
    """
    if data.dataset == "folder":
        return _folder_pictures(data)
    if data.dataset == "pairs":
        raise DataError("dataset pairs is trained on in crops: use --data.crop SIZE")
    return _prepared(data).pictures()


def picture_files(folder: epath.Path) -> list[epath.Path]:
    """Files whose ending is a picture's, in order of their names."""
    return [path for path in images.walk(folder) if path.suffix.lower() in images.SUFFIXES]


def _pairs(folder: epath.Path) -> Files:
    """Finds pictures of the same name, whatever their ending, in `degraded` and `original`."""
    sides = ("degraded", "original")
    found: dict[str, dict[str, epath.Path]] = {side: {} for side in sides}
    problems = []
    for side in sides:
        if not (folder / side).is_dir():
            raise DataError(f"{folder} has no folder {side}; pairs need two, {' and '.join(sides)}")
        for path in picture_files(folder / side):
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
    return Files(
        [found["original"][name] for name in names], [found["degraded"][name] for name in names]
    )


def _folder_pictures(data: Data) -> whole.Pictures:
    folder = _folder(data)
    files = images.walk(folder)
    found = readable_shapes(read_shape, files)
    shapes = dict(tqdm(found, "looking at pictures", len(files), unit="", delay=2, leave=False))
    if not shapes:
        raise DataError(f"{folder} holds no pictures; name a folder that does")
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
        raise DataError(f"{folder} is not a folder; name one that holds pictures")
    return folder


def _no_pictures(folder: epath.Path) -> DataError:
    return DataError(
        f"{folder} holds no pictures, which are known by endings such as .png and .jpg; name a "
        "folder that does"
    )


def _prepared(data: Data) -> tfds.Prepared:
    hint = (
        f", or install Debian's package dataset-fashion-mnist, or name a folder of "
        f"{IDX_FILES[0]} and {IDX_FILES[1]} (also .gz) with --data.data-dir"
        if data.dataset == "fashion_mnist"
        else ""
    )
    return tfds.Prepared(data, hint)
