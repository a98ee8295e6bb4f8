"""What a sandbox writes outside of its mounts: how much that is, and a cap where the file system keeps project quotas.

Owns the project id of a sandbox's writable layer. A project's files are counted by the file system as they are
written, which costs nothing; elsewhere they are counted by `du`, which takes its time. Root inside cannot leave its
project: the kernel lets nobody change it in a user namespace.

Formats: ioctl_xfs_fsgetxattr(2) and <linux/fs.h>; quotactl(2), quotactl_fd(2) and <linux/quota.h>. Failures are
OSError.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import struct
import subprocess
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from ..commands import tied
from . import mounts

PARTS = ("upper", "work")  # of an overlay: files are made in one and moved to the other, so both are of the project
FIRST, LAST = 1 << 24, 1 << 31  # projects; those of /etc/projid, which people number, are below
FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR, PROJINHERIT = 0x801C581F, 0x401C5820, 0x200
FSXATTR = "5I8x"  # xflags, extsize, nextents, projid, cowextsize
QUOTACTL_FD, PRJQUOTA, Q_GETQUOTA, Q_SETQUOTA = 443, 2, 0x800007, 0x800008
BLOCK, QIF_BLIMITS = 1024, 1
DQBLK = "8QI4x"  # bhardlimit, bsoftlimit, curspace, ihardlimit, isoftlimit, curinodes, btime, itime, valid

_libc = ctypes.CDLL(None, use_errno=True)


def has_quotas(path: Path) -> bool:
    """Whether the file system of a path counts and limits what projects use."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == number:
            return "prjquota" in after.split(" ")[-1].split(",")
    return False


def project(taken: Container[int]) -> int:
    """An id for a project that is not one of these."""
    while (number := FIRST + secrets.randbelow(LAST - FIRST)) in taken:
        pass
    return number


def assign(base: Path, number: int, limit: int) -> None:
    """Make the parts of an overlay, still empty, a project's, which may hold so many bytes; 0 is no limit."""
    for part in PARTS:
        with mounts.opened(os.open(base / part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            attributes = bytearray(struct.calcsize(FSXATTR))
            fcntl.ioctl(fd, FS_IOC_FSGETXATTR, attributes)
            flags, extent, extents, _, copied = struct.unpack(FSXATTR, attributes)
            fcntl.ioctl(
                fd, FS_IOC_FSSETXATTR, struct.pack(FSXATTR, flags | PROJINHERIT, extent, extents, number, copied)
            )
    _limit(base, number, limit)


def lift(state: Path, number: int) -> None:
    """Forget a project's limit. Silent when there is none, or no quotas any more."""
    with suppress(OSError):
        _limit(state, number, 0)


def use(base: Path, number: int) -> int:
    """Bytes on the disk that the layer holds; number 0 is no project."""
    if number:
        return int(struct.unpack(DQBLK, _quotactl(base, Q_GETQUOTA, number))[2])
    # With nobody's priority, and not in this process, whose threads have better to do.
    command = ["nice", "-n", "19", "du", "--summarize", "--one-file-system", "--block-size=1", str(base / "upper")]
    done = subprocess.run(tied(command), capture_output=True, check=False)  # files that vanish meanwhile are no matter
    total = done.stdout.split(b"\t")[0]
    if not total.isdigit():
        raise OSError(f"du: {done.stderr.decode(errors='replace').strip()}")
    return int(total)


def _limit(path: Path, number: int, limit: int) -> None:
    blocks = -(-limit // BLOCK)
    _quotactl(path, Q_SETQUOTA, number, struct.pack(DQBLK, blocks, blocks, 0, 0, 0, 0, 0, 0, QIF_BLIMITS))


def _quotactl(path: Path, command: int, number: int, data: bytes = b"") -> bytes:
    block = ctypes.create_string_buffer(data, struct.calcsize(DQBLK))
    with mounts.opened(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
        if _libc.syscall(QUOTACTL_FD, fd, command << 8 | PRJQUOTA, number, block) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), os.fspath(path))
    return block.raw
