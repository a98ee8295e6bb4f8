"""Tells open pages that something changed, not what: they ask again. Owns who watches what; keeps nothing else.

It knows the commits of this process alone. With several servers on one database, a page hears of the others' changes
when it polls.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

EVERYTHING = "*"  # to watch every cluster, node and session
LIMIT = 1000  # watchers at a time,
OWN = 100  # and of one account


class Changes:
    """Watchers by the ids that they watch. `publish` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.over = False  # the server is about to end: nobody should wait any longer
        self._watchers: dict[asyncio.Event, tuple[frozenset[str], asyncio.AbstractEventLoop, str]] = {}

    def publish(self, touched: Collection[str]) -> None:
        if not touched:
            return
        with self._lock:
            watchers = list(self._watchers.items())
        for event, (ids, loop, _) in watchers:
            if EVERYTHING in ids or not ids.isdisjoint(touched):
                try:
                    loop.call_soon_threadsafe(event.set)
                except RuntimeError:  # its loop has just closed
                    continue

    def close(self) -> None:
        """Let all who watch go, so that open pages do not hold up the server's end."""
        self.over = True
        with self._lock:
            watchers = list(self._watchers.items())
        for event, (_, loop, _) in watchers:
            loop.call_soon_threadsafe(event.set)

    @contextmanager
    def watch(self, ids: Collection[str], owner: str) -> Iterator[asyncio.Event | None]:
        """An event of the running loop that is set at each change of these; None when too many watch already.

        owner: the account whose page it is, which may have OWN.
        """
        event = asyncio.Event()
        with self._lock:
            owners = [one for *_, one in self._watchers.values()]
            full = len(owners) >= LIMIT or owners.count(owner) >= OWN
            if not full:
                self._watchers[event] = (frozenset(ids), asyncio.get_running_loop(), owner)
        try:
            yield None if full else event
        finally:
            with self._lock:
                self._watchers.pop(event, None)
