"""The programs that the driver needs: which there are, and those that every sandbox sees.

Owns: where they are looked for, and the copies of them that are run.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import shutil
import subprocess
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from ...errors import Error
from ..busybox import BUSYBOX

INITS = ("/usr/bin/tini-static", "/usr/bin/docker-init", "/usr/bin/catatonit", "/usr/libexec/podman/catatonit")
RUNTIMES = ("runc", "crun")
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
MFD_EXEC = 0x10  # of Linux 6.3


log = logging.getLogger(__name__)


def find(names: Iterable[str]) -> str:
    """The first of these programs that there is. Raises Error unavailable."""
    for name in names:
        if path := shutil.which(name):
            return path
    raise Error("unavailable", f"none of {', '.join(names)} is installed", "beaker executor doctor")


def sealed(path: str) -> str:
    """A name by which a child of this process can run a program from a copy that nobody can write to.

    What is in a container must not be able to write to the runtime that entered it (CVE-2019-5736), so runc and crun
    copy themselves at every start, which is a seventh of an `exec`, unless they are such a copy. Where none can be run
    it is the program's own path. Raises FileNotFoundError.
    """
    now = os.stat(path)
    copy = _copy(path, now.st_ino, now.st_mtime_ns, now.st_size)
    return path if copy is None else f"/proc/{os.getpid()}/fd/{copy}"


@functools.cache  # one that was replaced stays open, as it may be starting just now
def _copy(path: str, *_version: int) -> int | None:
    """A descriptor of a sealed copy in memory, None when none can be run. Source: memfd_create(2), and runc's libct."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        try:
            fd = os.memfd_create(Path(path).name, flags | MFD_EXEC)
        except OSError:
            fd = os.memfd_create(Path(path).name, flags)
        with open(fd, "wb", closefd=False) as file:
            file.write(Path(path).read_bytes())
        os.fchmod(fd, 0o755)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        subprocess.run([f"/proc/{os.getpid()}/fd/{fd}", "--version"], check=True, capture_output=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return fd


def install(directory: Path) -> None:
    """Put what every sandbox sees into a directory, where it is not there or another version."""
    init, busybox = find(INITS), find((BUSYBOX,))
    entry = (resources.files("beaker_sessions.sandbox") / "entry.sh").read_bytes()
    for name, data, mode in (
        ("init", Path(init).read_bytes(), 0o755),
        ("busybox", Path(busybox).read_bytes(), 0o755),
        ("entry.sh", entry, 0o644),
    ):
        path = directory / name
        if not path.exists() or path.read_bytes() != data:
            temporary = path.with_suffix(".new")
            try:
                temporary.write_bytes(data)
            except OSError as error:  # of a full disk: what is there will do, and what runs needs it
                temporary.unlink(missing_ok=True)
                log.error("%s is not brought up to date: %s", path, error)
                continue
            temporary.chmod(mode)
            temporary.replace(path)
