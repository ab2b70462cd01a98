"""Whole images, brought to one size and held in one array `(N, H, W, C)` uint8."""

import dataclasses
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from aecore.config import Data
from aecore.data.indexed import Shape, telling_what_lasts
from aecore.errors import DataError, ImageError
from aecore.media import images
from aecore.steps import memory

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures before they are brought to one size."""

    count: int
    read: Callable[[], Iterable[Sequence[Any]]]
    """Yields runs of pictures, in order. Each picture is a file, or an array `(H, W, C)` of uint8.
    Where all have one size, a run may be one array."""
    shape: tuple[int | None, int | None, int]
    """Their height, width and channels; None where they differ."""
    is_train: np.ndarray | None
    """`(N,)` bool; None: the source has no split of its own."""
    groups: Sequence[Any] | None = None
    """For each picture, the group it belongs to, such as a person. A group is not divided between
    training and validation. None: each picture is on its own."""


def decode(pictures: Pictures, data: Data, progress: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Decodes pictures in parallel and splits them. Broken ones are skipped with a warning.

    Returns:
      The images for training and those for validation.

    Raises:
      DataError: none can be decoded, they can't be split, or they differ in size while
        `data.image_size` is None.
    """
    shape = working_shape(pictures.shape, data)
    array = _allocate((pictures.count, *shape), memory_limit(data))
    good = np.zeros(len(array), bool)

    def decode_one(index: int, content: Any) -> None:
        try:
            if isinstance(content, np.ndarray):
                picture = images.from_array(content)
            else:
                with telling_what_lasts(content):
                    picture = images.read(content)
            array[index] = images.at_working_size(picture, shape[:2], shape[2], data.resize)
            good[index] = True
        except ImageError as error:
            named = isinstance(content, np.ndarray) or str(content) in str(error)
            _log.warning("skipped: %s", error if named else f"{content}: {error}")

    # Pillow releases the interpreter's lock while it decodes and resizes.
    with (
        ThreadPoolExecutor() as pool,
        tqdm(
            desc=f"decoding {data.dataset}",
            total=len(array),
            delay=2,
            leave=False,
            disable=None if progress else True,
        ) as bar,
    ):
        stop = 0
        for run in pictures.read():
            place = slice(stop, stop := stop + len(run))
            if isinstance(run, np.ndarray) and run.shape[1:] == shape:
                array[place], good[place] = run, True
            else:
                list(pool.map(decode_one, range(place.start, place.stop), run))
            bar.update(len(run))

    if not good.any():
        raise DataError(f"none of the {len(array)} pictures of {data.dataset} can be decoded")
    is_train = pictures.is_train
    if is_train is None:
        is_train = split(pictures.groups or range(len(array)), good, data)
    return _select(array, good & is_train), _select(array, good & ~is_train)


def resize(train: np.ndarray, validation: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Brings `(N, H, W, C)` uint8 images to the size and the channels that the settings ask for."""
    if validation.shape[1:] != train.shape[1:]:
        raise DataError(
            f"the training images are {train.shape[1:]}, those for validation "
            f"{validation.shape[1:]}"
        )
    height, width, channels = train.shape[1:]
    shape = working_shape((height, width, channels), data)
    if shape == train.shape[1:]:
        return train, validation

    def resized(array: np.ndarray) -> np.ndarray:
        result = _allocate((len(array), *shape), memory_limit(data))
        for index, image in enumerate(array):
            picture = images.from_array(image)
            result[index] = images.at_working_size(picture, shape[:2], shape[2], data.resize)
        return result

    return resized(train), resized(validation)


def working_shape(shape: tuple[int | None, int | None, int], data: Data) -> Shape:
    """The shape to bring images to whose own is given, None where they differ."""
    height, width = data.image_size or shape[:2]
    if height is None or width is None:
        raise DataError(
            "the images differ in size; choose one with --data.image-size HEIGHT WIDTH, "
            "or train on crops with --data.crop SIZE"
        )
    return height, width, data.channels or shape[2]


def memory_limit(data: Data) -> float:
    """How many bytes of images may be held in memory."""
    if data.memory_limit is not None:
        return data.memory_limit * 2**30
    # A quarter, as the parts of a dataset, and then TensorFlow, hold a copy each.
    return memory.physical() / 4


def _allocate(shape: tuple[int, ...], limit: float) -> np.ndarray:
    """A uint8 array in memory, or in a temporary file that vanishes with it.

    Raises:
      DataError: neither has so much room.
    """
    needed = math.prod(shape)
    if needed <= limit:
        return np.empty(shape, np.uint8)
    folder = tempfile.gettempdir()
    if needed > shutil.disk_usage(folder).free:
        raise DataError(
            f"{shape[0]:,} images of {shape[1]}x{shape[2]} need {needed / 1e9:,.1f} GB, more than "
            f"there is in memory or in {folder}; use a smaller --data.image-size"
        )
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)


def _select(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`array[mask]`, in a file where the array is in one."""
    if mask.all():
        return array
    if not isinstance(array, np.memmap):
        return array[mask]
    selected = _allocate((int(mask.sum()), *array.shape[1:]), limit=0)
    for target, index in enumerate(np.flatnonzero(mask)):
        selected[target] = array[index]
    return selected


def split(groups: Sequence[Any], good: np.ndarray, data: Data) -> np.ndarray:
    """Chooses what is held out for validation, never part of a group.

    Args:
      groups: for each image, the group it belongs to.
      good: `(N,)` bool, which images there are.
      data: says how many, and the seed of the choice.

    Returns:
      `(N,)` bool: which images are for training.

    Raises:
      DataError: nothing would be left for training.
    """
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    order = np.random.Generator(np.random.Philox(data.split_seed)).permutation(len(names))
    sizes = np.bincount(group, weights=good, minlength=len(names))[order]
    wanted = max(1.0, data.validation_fraction * good.sum())
    held_out = order[np.cumsum(sizes) - sizes < wanted]
    is_train = ~np.isin(group, held_out)
    if not (good & is_train).any():
        raise DataError(
            f"{int(good.sum())} image(s) can't be split into training and validation with "
            f"--data.validation-fraction {data.validation_fraction}; add more, or use a smaller one"
        )
    return is_train
