"""The id maps of the sandboxes that exist, so that no two of different accounts meet.

Owns that memory, which is what the kernel enforces: a range in /etc/subuid may have gone or moved since a sandbox was
made, and whose ids a directory service will tell of next, nobody knows. Reads and writes no file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

from ...errors import Error
from .mounts import IdMap
from .userns import SIZE


class IdMaps:
    def __init__(self) -> None:
        self._maps: dict[str, tuple[IdMap, IdMap]] = {}
        self._lock = threading.Lock()

    def add(self, id: str, uids: IdMap, gids: IdMap) -> None:
        """A sandbox that exists already."""
        with self._lock:
            self._maps[id] = (uids, gids)

    def take(self, id: str, uids: IdMap, gids: IdMap) -> None:
        """One that is about to be made. Raises Error conflict when root of it would be somebody in another, or the
        other way round.
        """
        with self._lock:
            for other, theirs in self._maps.items():
                for kind, one, two in (("user", uids, theirs[0]), ("group", gids, theirs[1])):
                    for number in _meets(one, two):
                        raise Error(
                            "conflict",
                            f"the {kind} id {number} would be in this session and in {other}, which is another's",
                            "the administrator gives each account a range of its own: beaker executor doctor",
                        )
            self._maps[id] = (uids, gids)

    def drop(self, id: str) -> None:
        with self._lock:
            self._maps.pop(id, None)


def _meets(one: IdMap, two: IdMap) -> Iterator[int]:
    """Ids of the machine that are subordinate in one of two maps and mean anything in the other."""
    mine, theirs = _start(one), _start(two)
    if mine == theirs:
        return  # the same account's
    if mine is not None and theirs is not None and abs(mine - theirs) < SIZE:
        yield max(mine, theirs)
    for start, other in ((mine, two), (theirs, one)):
        for first, outside, _ in other:
            if start is not None and first == outside and start <= outside < start + SIZE:
                yield outside


def _start(map: IdMap) -> int | None:
    """Where the account's own range begins."""
    return next((outside - first for first, outside, _ in map if first != outside), None)
