"""Processes that outlive the executor, known by pid and start time, so that a pid used again is not taken for another.

Reads proc(5), signals through pidfds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from .. import commands

FORKED = 0x40  # PF_FORKNOEXEC, a flag of a process that has executed no program since it was forked; linux/sched.h
PIDFD_GETFD = 438  # its number on every machine

PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # they say nothing of a process: it may well live

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Process:
    """pid: 0 for none. started: in clock ticks since boot."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """The process that has this pid now; one that has ended is gone."""
        return cls(pid, _started(pid))

    def alive(self) -> bool:
        return self.pid > 0 and self.started > 0 and _started(self.pid) == self.started

    def forked(self) -> bool:
        """Whether it lives, and still runs the program of the process that forked it. False once it has ended."""
        fields = _stat(self.pid)
        return self.started > 0 and _start_time(fields) == self.started and bool(int(fields[6]) & FORKED)

    def stopped(self) -> bool:
        return _stat(self.pid)[:1] == [b"T"]

    def heeds(self, number: int, name: str, seconds: float) -> bool:
        """Whether it has become a program of this name, and handles a signal or waits for it, within this time."""
        deadline = time.monotonic() + seconds
        while self.alive() and not _handled(self.pid, name) >> (number - 1) & 1:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def open(self) -> int | None:
        """A pidfd, readable when the process has ended; None when it has ended already.

        Raises OSError, as all of these do, when the machine has no descriptor or memory left at this moment.
        """
        if self.pid <= 0 or self.started <= 0:
            return None
        try:
            fd = os.pidfd_open(self.pid)
        except OSError as error:
            if error.errno in PASSING:
                raise
            return None
        try:
            if _started(self.pid) == self.started:
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Silent when it has ended."""
        if (fd := self.open()) is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, number)
            os.close(fd)

    @staticmethod
    def descriptor(pidfd: int, number: int) -> int:
        """One of a process's descriptors, as one's own. Raises OSError."""
        fd = _libc.syscall(PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return int(fd)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within this time."""
        if (fd := self.open()) is None:
            return True
        try:
            return readable(fd, seconds)
        finally:
            os.close(fd)


def mentioning(path: Path) -> list[Process]:
    """Root's processes that were started with this path, or one below it, as an argument."""
    text = os.fsencode(path)
    return [
        Process.of(pid)
        for pid, words in commands.of(0)
        if any(word == text or word.startswith(text + b"/") for word in words)
    ]


def readable(fd: int, seconds: float) -> bool:
    """Whether a descriptor, of any number, becomes readable or ends within this time."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))


def _started(pid: int) -> int:
    return _start_time(_stat(pid))


def _start_time(fields: list[bytes]) -> int:
    """0 for a process that has ended, even if nobody has waited for it."""
    return 0 if not fields or fields[0] in (b"Z", b"X") else int(fields[19])


def _stat(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the state on, none for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError as error:
        if error.errno in PASSING:
            raise
        return []


def _handled(pid: int, name: str) -> int:
    """The signals that a process has handlers for, or fetches: a bit for each, the first is 1's. 0 for another program.

    While one waits in sigtimedwait(2), what it fetches is not shown as blocked; tini, which does, ignores SIGTTOU then.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    if fields["Name"].strip() != name:
        return 0
    caught, blocked, ignored = (int(fields[mask], 16) for mask in ("SigCgt", "SigBlk", "SigIgn"))
    return -1 if ignored >> (signal.SIGTTOU - 1) & 1 else caught | blocked
