"""A file system that answers no write, and a process whose memory can be looked at by nobody because of it.

`python -m tests.silent MOUNTPOINT` serves it; `HOSTILE` is what such a process runs, with its file as the argument. One
thread changes a page that is being written, which waits for the file system; another removes that page, which waits for
the first and lets nobody else near the process's memory meanwhile.
"""

from __future__ import annotations

import errno
import stat
import sys
import time
from typing import Any

HOSTILE = """
import ctypes, os, sys, threading, time
fd, libc = os.open(sys.argv[1], os.O_RDWR), ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
page = libc.mmap(None, 4096, 3, 1, fd, 0)  # PROT_READ | PROT_WRITE, MAP_SHARED
page = ctypes.c_void_p(page)
libc.memset(page, 1, 4096)
libc.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(0), 2)  # SYNC_FILE_RANGE_WRITE, without waiting
threading.Thread(target=libc.memset, args=(page, 2, 4096), daemon=True).start()
time.sleep(1)
os.write(1, b"ready")
libc.munmap(page, ctypes.c_size_t(4096))
"""


def main() -> None:
    import mfusepy as fuse

    class Silent(fuse.Operations):  # type: ignore[misc]
        def getattr(self, path: str, fh: Any = None) -> dict[str, int]:  # noqa: ARG002
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o755, "st_nlink": 2}
            if path == "/file":
                return {"st_mode": stat.S_IFREG | 0o666, "st_nlink": 1, "st_size": 1 << 20}
            raise fuse.FuseOSError(errno.ENOENT)

        def open(self, path: str, flags: int) -> int:  # noqa: ARG002
            return 0

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:  # noqa: ARG002
            return bytes(size)

        def write(self, path: str, data: bytes, offset: int, fh: int) -> int:  # noqa: ARG002
            time.sleep(600)
            return len(data)

    fuse.FUSE(Silent(), sys.argv[1], foreground=True, allow_other=True)


if __name__ == "__main__":
    main()
