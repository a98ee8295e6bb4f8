"""One living executor for one state directory: a lock that a process holds for its life.

A process that was killed may still hold it, when one of its threads cannot end because a file system does not answer.
It runs no code any more, so another may take its place.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from ..errors import Error

PATIENCE = 3.0  # seconds in which one that was told to end lets go
PAUSE = 0.05


def hold(path: Path) -> int:
    """A descriptor to be kept open. Raises Error conflict while another living process has the lock."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.parent.chmod(0o700)  # earlier versions let everybody in, where the ledger says what was run
    if path.is_dir():  # whoever did that
        path.rename(path.with_name(f"{path.name}.damaged-{os.getpid()}"))
    deadline = time.monotonic() + PATIENCE
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(lock).st_ino:
                own = str(os.getpid()).encode()
                with suppress(OSError):  # first over what is there, for which even a full disk has room
                    os.pwrite(lock, own, 0)
                    os.ftruncate(lock, len(own))
                return lock
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode()
            if time.monotonic() > deadline:
                if not holder.isdecimal() or _lives(holder):
                    what = f"another executor, process {holder or 'unknown'}, keeps its state in {path.parent}"
                    raise Error("conflict", what, "stop it first, or choose another storagePath") from None
                path.unlink(missing_ok=True)
        os.close(lock)
        time.sleep(PAUSE)


def _lives(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
