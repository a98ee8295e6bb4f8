"""The output of sessions as it is handed over by descriptor: the file that was kept, or memory that callers share.

Owns that memory: what is handed over lives as long as its receiver likes and is charged to nobody, so there is little
of it. Decides nothing about who may have it.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

FRESH = 1.0  # seconds in which a live session's output is not read again


@dataclass
class _Live:
    lock: threading.Lock = field(default_factory=threading.Lock)
    descriptor: int = -1
    read: float = 0.0

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Outputs:
    """From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: dict[str, _Live] = {}

    def of(self, id: str, read: Callable[[], bytes], live: Iterable[str]) -> int:
        """A descriptor of a live session's output at its beginning, unchangeable. live: the sessions there are."""
        kept = set(live)
        with self._lock:
            self._live = {key: one for key, one in self._live.items() if key in kept or key == id}
            one = self._live.setdefault(id, _Live())
        with one.lock:
            if one.descriptor < 0 or time.monotonic() - one.read >= FRESH:
                output = read()
                one.read = time.monotonic()
                if one.descriptor < 0 or output != _content(one.descriptor):
                    new = sealed(output)
                    if one.descriptor >= 0:
                        os.close(one.descriptor)
                    one.descriptor = new
            return os.open(f"/proc/self/fd/{one.descriptor}", os.O_RDONLY | os.O_CLOEXEC)  # a place of its own in it


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def sealed(data: bytes) -> int:
    """A descriptor of these bytes in memory, unchangeable, at their beginning. They go with its last holder."""
    descriptor = os.memfd_create("output", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
