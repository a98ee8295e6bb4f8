"""Waiting for the ends of sandboxes: conmon ends when it has written the exit code, and a pidfd tells of that at once.

Owns: the pidfds of what runs. Also trims the logs of what runs, which nobody else would. Needs no inotify: the kernel
charges the instances of sessions to root (user_namespaces(7)), who may have none left.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import inotify, logs
from .record import Record

TRIM = 5.0  # seconds between two looks at all logs; at once where conmon has begun a new one
SOON = 0.02  # seconds until a log that somebody held is looked at again
log = logging.getLogger(__name__)


class Watch:
    """sandboxes: all that there are, with their directories."""

    def __init__(self, sandboxes: Callable[[], Iterator[tuple[Path, Record]]]) -> None:
        self.sandboxes = sandboxes
        self._logs = _renames()
        self._reader, self._writer = os.pipe()
        self._open: dict[str, int] = {}
        self._late: set[Path] = set()

    def tell(self, id: str) -> None:
        """From another thread: something may have changed with this sandbox."""
        os.write(self._writer, id.encode() + b"\n")

    def __iter__(self) -> Iterator[str]:
        ended: set[str] = set()
        while True:
            known = set()
            for directory, sandbox in self.sandboxes():
                known.add(sandbox.id)
                if sandbox.id in ended:
                    continue
                self._trim(directory)
                if sandbox.id not in self._open:
                    fd = sandbox.conmon.open()
                    if fd is None:
                        ended.add(sandbox.id)
                        yield sandbox.id
                    else:
                        self._open[sandbox.id] = fd
                        with contextlib.suppress(OSError):  # no watch is left, or it is removed
                            if self._logs:
                                self._logs.add(directory)
            ended &= known
            by_fd = {fd: id for id, fd in self._open.items()}
            for fd in self._ready([self._reader, *by_fd]):
                if fd == self._reader:
                    yield from os.read(fd, 65536).decode().split()
                else:
                    ended.add(by_fd[fd])
                    os.close(self._open.pop(by_fd[fd]))
                    yield by_fd[fd]

    def _ready(self, fds: list[int]) -> list[int]:
        """Those that are readable, none after TRIM. Trims logs meanwhile: each that is begun is no reason to look at
        all sandboxes again.
        """
        poll = select.poll()  # select(2) takes no descriptors above 1023
        for fd in (*fds, *([self._logs.fd] if self._logs else [])):
            poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + TRIM
        while (left := deadline - time.monotonic()) > 0:
            ready = [fd for fd, _ in poll.poll((min(left, SOON) if self._late else left) * 1000)]
            for directory in tuple(self._late):
                self._trim(directory)
            if self._logs and self._logs.fd in ready:
                ready.remove(self._logs.fd)
                for directory in self._logs.into("log"):
                    self._trim(directory)
            if ready:
                return ready
        return []

    def _trim(self, directory: Path) -> None:
        """Now, or soon when somebody holds it: conmon may begin one more before long."""
        (self._late.discard if logs.trim(directory) else self._late.add)(directory)

    def close(self) -> None:
        for fd in (self._reader, self._writer, *([self._logs.fd] if self._logs else []), *self._open.values()):
            os.close(fd)


def _renames() -> inotify.Renames | None:
    """None when no instance is left: logs are then trimmed at TRIM alone."""
    try:
        return inotify.Renames()
    except OSError as error:
        log.warning("logs are looked at now and then only: inotify: %s: beaker executor doctor", error.strerror)
        return None
