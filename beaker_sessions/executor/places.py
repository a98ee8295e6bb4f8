"""How many things are done at the same moment, the first that came first.

Owns the order alone: who waits does so in a thread of its own, of which `loop.Workers` has a fixed number.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Places:
    """count: so many at once."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._numbers = itertools.count()
        self._waiting: list[int] = []
        self._changed = threading.Condition()

    def number(self) -> int:
        """A place in the order, to be taken now and used later."""
        return next(self._numbers)

    @contextmanager
    def held(self, number: int) -> Iterator[None]:
        """Wait until one is free and nobody waits who has a lower number. Who has not come yet holds nobody up."""
        with self._changed:
            heapq.heappush(self._waiting, number)
            while not self._free or self._waiting[0] != number:
                self._changed.wait()
            heapq.heappop(self._waiting)
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
