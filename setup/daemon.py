"""Programs left running in the background of a machine without systemd, known by a pid file with their start time.

A pid alone may be another process's by now; with the time at which it started it is this one or none.
"""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import BinaryIO

from . import host
from .steps import Failed


def environment() -> dict[str, str]:
    """What root's own programs see: nothing of the user who happens to start them but the way to the network."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",  # what root runs is compiled when it is installed
        **{key: value for key, value in os.environ.items() if key in host.PROXIES},
    }


def start(name: str, argv: list[str]) -> int:
    """Start a program in a session of its own, its output appended to its log: the pid."""
    with _opened(log(name)) as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd="/",
            env=environment(),
            start_new_session=True,
        )
    host.write(_file(name), f"{process.pid} {host.start_time(process.pid)}\n")
    process.returncode = 0  # it outlives us: no warning that it does
    return process.pid


def pid(name: str) -> int | None:
    """The pid of the program started by that name, None unless it runs."""
    try:
        number, began = _file(name).read_text().split()
    except (OSError, ValueError):
        return None
    return int(number) if host.start_time(int(number)) == began else None


def alive(number: int) -> bool:
    return host.start_time(number) is not None


def stop(name: str, seconds: float = 30) -> bool:
    """End it, if it runs: whether it did. Raises Failed when it does not end; it is never killed."""
    number = pid(name)
    if number:
        os.kill(number, signal.SIGTERM)
        end = time.monotonic() + seconds
        while alive(number):
            if time.monotonic() > end:
                raise Failed(f"{name} (pid {number}) does not end after {seconds:.0f} s; its log is {log(name)}")
            time.sleep(0.05)
    _file(name).unlink(missing_ok=True)
    return number is not None


def log(name: str) -> Path:
    return host.LOGS / f"{name}.log"


def tail(name: str, lines: int = 15) -> list[str]:
    """The end of its log."""
    try:
        return log(name).read_text(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def _opened(path: Path) -> BinaryIO:
    """To append to a log, which nobody may read but root and the group adm, where there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640), "ab")  # noqa: SIM115
    os.fchmod(file.fileno(), 0o640)  # one of an older version was for everybody
    with contextlib.suppress(KeyError, PermissionError):
        os.fchown(file.fileno(), -1, grp.getgrnam("adm").gr_gid)
    return file


def _file(name: str) -> Path:
    return host.RUN / f"{name}.pid"
