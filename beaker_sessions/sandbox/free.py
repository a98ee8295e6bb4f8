"""How much of a disk must stay free, whatever images want: the ledger and the logs of the machine may be on it."""

from __future__ import annotations

import os

from ..grammar import format_size

FLOOR, SHARE = 2 << 30, 0.05  # bytes, or that share of the file system if it is less
INODES = 0.02  # the share of its inodes


def lacks(path: str | os.PathLike[str], more: int = 0) -> str:
    """Why so many more bytes must not be written to the file system of path, "" where they may."""
    disk = os.statvfs(path)
    size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    floor = min(FLOOR, int(size * SHARE))
    if free - more < floor:
        return f"the disk of {path} has {format_size(free)} free, of which {format_size(floor)} must stay free"
    if disk.f_files and disk.f_favail < disk.f_files * INODES:
        return f"the disk of {path} has no room for more files"
    return ""
