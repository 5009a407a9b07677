"""Work done ahead: a thread has the next items of an iterator ready before they are asked for.

The thread runs one job per item and never waits for room, so that nothing has to wake it up: at most `depth` jobs are
queued, and each item taken queues another. It ends when its owner is dropped or closed, and with the interpreter.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """The items of an endless iterator, up to `depth` of them worked out ahead by one thread.

    What the iterator raises is raised by the `take` that would have given the item; after that it is of no more use.
    The iterator must not hold on to whoever owns this, or neither is ever dropped.
    """

    def __init__(self, items: Iterator[Item], *, depth: int) -> None:
        self._items = items
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crosscoder-ahead")
        self._pending: deque[Future[Item]] = deque()
        self._close = weakref.finalize(self, _stop, self._executor)
        for _ in range(depth):
            self._queue()

    def take(self) -> Item:
        """The next item; waits for it where it is not ready."""
        item = self._pending.popleft().result()
        self._queue()
        return item

    def close(self) -> None:
        """Give up the items that are not begun; the thread ends after the one it is working on."""
        self._close()

    def _queue(self) -> None:
        self._pending.append(self._executor.submit(next, self._items))


def _stop(executor: ThreadPoolExecutor) -> None:
    """Does not wait: it may be the thread itself that drops the last reference to its owner."""
    executor.shutdown(wait=False, cancel_futures=True)
