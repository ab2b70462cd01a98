"""Shapes of many pictures, of which only the headers are read, several at the same time."""

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aecore.data.ahead import results_ahead
from aecore.data.indexed import Shape
from aecore.errors import ImageError
from aecore.storage import REQUESTS

_log = logging.getLogger(__name__)

Item = TypeVar("Item")

_told: dict[int, set[str]] = {}
"""What was said of each source, by its `id`, as long as it lives."""
_lock = threading.Lock()


def warn(error: ImageError, source: Any = None) -> None:
    """Says that a picture is left out; of one source once, however many look at its pictures."""
    if source is not None:
        with _lock:
            if id(source) not in _told:
                _told[id(source)] = set()
                weakref.finalize(source, _told.pop, id(source), None)
            told = _told[id(source)]
            is_new = str(error) not in told
            told.add(str(error))
        if not is_new:
            return
    _log.warning("skipped: %s", error)


def readable_shapes(
    shape_of: Callable[[Item], Shape], items: Sequence[Item], source: Any = None
) -> Iterator[tuple[Item, Shape]]:
    """Pictures whose headers can be read, in order. Others are left out, with a warning for each.

    Args:
      shape_of: reads one picture's shape, in one of several threads; ImageError: it is broken.
      items: the pictures, by whatever `shape_of` takes.
      source: what they are of, for `warn`.

    Yields:
      A picture, and its height, width and channels.
    """

    def attempt(item: Item) -> Shape | ImageError:
        try:
            return shape_of(item)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(REQUESTS) as pool:
        found = results_ahead(lambda item: pool.submit(attempt, item), items, most=2 * REQUESTS)
        for item, shape in zip(items, found, strict=True):
            if isinstance(shape, ImageError):
                warn(shape, source)
            else:
                yield item, shape
