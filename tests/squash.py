"""A file system that shows a directory as NFS with root squashed does: to whoever is root it is as to a stranger.

`python -m tests.squash DIRECTORY MOUNTPOINT`. By FUSE, which tells the user of each request, the same that NFS sends
(fsuid, not uid). Prints a line when it is mounted.
"""

# ruff: noqa: ARG002

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

import mfusepy as fuse


class Squash(fuse.Operations):  # type: ignore[misc]
    use_ns = True

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def _path(self, path: str, needs: int = 0) -> str:
        """Where it is; needs: the mode bits of `others` that root would have to have."""
        own = self.directory / path.lstrip("/")
        if fuse.fuse_get_context()[0] == 0:
            above = [p for p in own.parents if p.is_relative_to(self.directory)]
            if any(not p.stat().st_mode & stat.S_IXOTH for p in above) or own.stat().st_mode & needs != needs:
                raise fuse.FuseOSError(errno.EACCES)
        return str(own)

    def init(self, path: str) -> None:
        print("mounted", flush=True)

    def access(self, path: str, amode: int) -> int:
        self._path(path, amode)
        return 0

    def getattr(self, path: str, fh: Any = None) -> dict[str, int]:
        found = os.lstat(self._path(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size")
        return {name: getattr(found, name) for name in names}

    def readdir(self, path: str, fh: Any) -> list[str]:
        return [".", "..", *os.listdir(self._path(path, stat.S_IROTH))]

    def create(self, path: str, mode: int, fi: Any = None) -> int:
        self._path(os.path.dirname(path), stat.S_IWOTH)
        fd = os.open(self.directory / path.lstrip("/"), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        os.fchown(fd, *fuse.fuse_get_context()[:2])
        return fd

    def open(self, path: str, flags: int) -> int:
        return os.open(self._path(path, stat.S_IROTH), flags)

    def mkdir(self, path: str, mode: int) -> int:
        self._path(os.path.dirname(path), stat.S_IWOTH)
        os.mkdir(self.directory / path.lstrip("/"), mode)
        os.chown(self.directory / path.lstrip("/"), *fuse.fuse_get_context()[:2])
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        return os.pread(fh, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        return os.pwrite(fh, data, offset)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0


if __name__ == "__main__":
    fuse.FUSE(Squash(Path(sys.argv[1])), sys.argv[2], foreground=True, nothreads=True, allow_other=True)
