"""Files that are renamed into directories, told by the kernel. Source: inotify(7); numbers from linux/inotify.h."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

MOVED_TO, ONLYDIR = 0x80, 0x01000000
HEADER = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows

_libc = ctypes.CDLL(None, use_errno=True)


class Renames:
    """fd: readable when a file was renamed into one of the directories that are watched."""

    def __init__(self) -> None:
        self.fd = _checked(_libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))
        self._directories: dict[int, Path] = {}

    def add(self, directory: Path) -> None:
        """Watch a directory until it is gone. Raises OSError, when the machine has no watch left too."""
        watch = _checked(_libc.inotify_add_watch(self.fd, os.fsencode(directory), MOVED_TO | ONLYDIR))
        self._directories[watch] = directory

    def into(self, name: str) -> set[Path]:
        """The directories into which a file of that name was renamed since the last call."""
        found: set[Path] = set()
        while True:
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return found
            while data:
                watch, mask, _, length = HEADER.unpack_from(data)
                if mask & MOVED_TO:
                    if data[HEADER.size : HEADER.size + length].rstrip(b"\0") == name.encode():
                        found.add(self._directories[watch])
                else:
                    self._directories.pop(watch, None)  # IN_IGNORED: it is gone
                data = data[HEADER.size + length :]


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
