"""Whose subordinate ids a uid is one of: somebody with `newuidmap` can have 65536 of them, and is one person.

Reads /etc/subuid (subuid(5)); asks no directory service for a name, since that may take seconds.
"""

from __future__ import annotations

import bisect
from pathlib import Path

FILE = Path("/etc/subuid")
Stamp = tuple[int, int, int]


class Subordinate:
    """The ranges of a file, read again when it has changed."""

    def __init__(self, file: Path = FILE) -> None:
        self._file = file
        self._stamp: Stamp | None = None
        self._ranges: list[tuple[int, int, str]] = []  # first, last, owner: a name, or a uid in digits; in order

    def owner(self, uid: int) -> str:
        """The owner of the range that begins last before this uid and holds it; "" for none, and for root's uid."""
        try:
            found = self._file.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if stamp != self._stamp:
                self._stamp, self._ranges = stamp, _ranges(self._file.read_text("utf-8", "surrogateescape"))
        except OSError:
            self._stamp, self._ranges = None, []
        at = bisect.bisect_right(self._ranges, (uid, 1 << 64, "")) - 1
        if uid == 0 or at < 0 or uid > self._ranges[at][1]:
            return ""
        return self._ranges[at][2]


def _ranges(text: str) -> list[tuple[int, int, str]]:
    found = []
    for line in text.splitlines():
        owner, first, count, *_ = (*line.split(":"), "", "")
        if owner and first.isdecimal() and count.isdecimal():
            found.append((int(first), int(first) + int(count) - 1, owner))
    return sorted(found)
