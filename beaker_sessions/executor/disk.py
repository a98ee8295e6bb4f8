"""How much of the node's disk each session holds outside of home and /net, and a word to those that hold too much.

Owns when that is looked at, which is dear where the file system does not count for us, and who is warned. It never ends
a session or deletes anything: where a cap can be enforced, the driver's file system does that.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping

from ..errors import Error
from ..grammar import format_size, parse_size
from ..model import State
from ..sandbox import Sandboxes
from ..settings import ExecutorSettings
from .sessions import Sessions

STEP = 10.0  # seconds between two rounds
SHARE = 100  # a look that took a second is not repeated for so many
SCARCE = 20 << 30  # bytes free, or a tenth of the disk if that is less, below which the largest are told
LARGE, LARGEST = 1 << 30, 3  # how large a session must be to be told then, and how many are
AGAIN = 3600.0  # seconds until the same is said again

log = logging.getLogger(__name__)


def limit(settings: ExecutorSettings) -> int:
    """Bytes that a session may write outside of its mounts, 0 for no limit. Raises Error invalid."""
    try:
        return parse_size(settings.session_disk) if settings.session_disk else 0
    except ValueError as error:
        raise Error("invalid", f"sessionDisk: {error}", "correct the settings") from error


class Disk:
    """`run` starts the thread that looks; `use` is for whoever shows it."""

    def __init__(self, sessions: Sessions, driver: Sandboxes, settings: ExecutorSettings) -> None:
        self.sessions, self.driver, self.storage, self.limit = sessions, driver, settings.storage_path, limit(settings)
        self._used: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def run(self) -> None:
        threading.Thread(target=self._loop, name="disk", daemon=True).start()

    def use(self, id: str) -> int | None:
        """Bytes that a session holds, as last seen; None when that is not known."""
        return self._used.get(id)

    def _loop(self) -> None:
        while True:
            try:
                self.look()
            except Exception:
                log.exception("looking at the disk failed")
            time.sleep(STEP)

    def look(self) -> None:
        """One round: measure whose time has come, and warn."""
        running = {session.id for session in self.sessions.live() if session.state == State.STARTED}
        for known in (self._used, self._due, self._told):
            for id in known.keys() - running:
                del known[id]
        for id in sorted(running, key=lambda id: self._due.get(id, 0.0)):
            begin = time.monotonic()
            if begin < self._due.get(id, 0.0):
                continue
            try:
                used = self.driver.disk(id)
            except Error as error:
                if error.code != "not_found":  # it has ended, as reconcile will find
                    log.info("what session %s holds is not known: %s", id, error)
                used = None
            if used is None:
                self._used.pop(id, None)
            else:
                self._used[id] = used
            self._due[id] = time.monotonic() + (time.monotonic() - begin) * SHARE
        disk = os.statvfs(self.storage)
        words = warnings(self._used, self.limit, disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize)
        for id in running:
            self._tell(id, words.get(id, ""))

    def _tell(self, id: str, text: str) -> None:
        now = time.monotonic()
        if not text:
            self._told.pop(id, None)
        elif now - self._told.get(id, -AGAIN) < AGAIN:
            return
        else:
            self._told[id] = now
            log.warning("session %s: %s", id, text)
        self.sessions.notice(id, "disk", text)


def warnings(used: Mapping[str, int], limit: int, free: int, total: int) -> dict[str, str]:
    """What to tell which sessions. used: session -> bytes. free, total: of the disk."""
    words = {}
    if free < min(SCARCE, total // 10):
        for id in sorted(used, key=lambda id: used[id], reverse=True)[:LARGEST]:
            if used[id] >= LARGE:
                words[id] = (
                    f"the disk of this node is nearly full ({format_size(free)} left), and this session holds"
                    f" {format_size(used[id])} of it outside of home and /net; delete what you can spare"
                )
    for id, held in used.items():
        if limit and held >= limit * 0.9:
            words[id] = (
                f"this session holds {format_size(held)} outside of home and /net, of {format_size(limit)} that it may;"
                " delete what you can spare"
            )
    return words
