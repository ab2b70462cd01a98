"""Results in order, of which the next are made in threads while one is used."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def results_ahead(
    submit: Callable[[Item], Future[Result]],
    items: Iterable[Item],
    *,
    most: float = 1,
    cost: Callable[[Item], float] = lambda item: 1,
) -> Iterator[Result]:
    """The result for each item, in order.

    Args:
      submit: begins to make an item's result.
      items: what to make results for.
      most: what the results made ahead may cost together; one is made ahead in any case.
      cost: of making and holding one result.
    """
    begun: collections.deque[tuple[Future[Result], float]] = collections.deque()
    waiting = collections.deque(items)
    total = 0.0

    def begin():
        nonlocal total
        while waiting and (not begun or total + cost(waiting[0]) <= most):
            item = waiting.popleft()
            total += cost(item)
            begun.append((submit(item), cost(item)))

    begin()
    while begun:
        future, spent = begun.popleft()
        total -= spent
        begin()
        yield future.result()
