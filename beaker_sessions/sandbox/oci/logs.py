"""The output of a sandbox as conmon keeps it, in the format of Kubernetes: `TIME STREAM P|F TEXT`, P without newline.

Owns: the log files of one sandbox: `log`, which conmon writes, and `log.old`, what was in it before conmon was last
told to begin a new one. That happens when somebody comes back, because it marks the place in the output where their
connection began, and when the log is long.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import framed as frame
from . import conmon
from .processes import Process

KEEP = 8 << 20  # bytes of a log file
REPLAY = 64 << 10  # bytes of recent output that an attach shows,
LINE = 4 << 10  # and at most so many more, to begin with a line
BLOCK = 256 << 10  # bytes of a log that are read at once
PATIENCE = 5.0  # seconds for conmon to begin a new file
PAUSE = 0.0005
STREAMS = (b"stdout", b"stderr")
NAMES = ("log", "log.closed", "log.old")  # newest first


def payload(text: bytes, *, framed: bool = False) -> bytes:
    """The output in a piece of a log that begins with a whole line. framed: as of `Sandboxes.logs`."""
    output = bytearray()
    for line in io.BytesIO(text):  # one at a time: many short ones are many times as large as objects
        fields = line.split(b" ", 3)
        if len(fields) == 4 and fields[1] in STREAMS and line.endswith(b"\n"):
            data = fields[3][:-1] if fields[2] == b"P" else fields[3]
            output += frame(STREAMS.index(fields[1]) + 1, data) if framed else data
    return bytes(output)


def tail(directory: Path, limit: int, *, framed: bool = False, names: Iterable[str] = NAMES) -> bytes:
    """The last `limit` bytes of output in these files. framed: as of `Sandboxes.logs`."""
    result, inodes = b"", set()
    for name in names:
        with contextlib.suppress(FileNotFoundError), open(directory / name, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino  # until conmon has begun a new log, the closed one is this one
            if inode not in inodes and len(result) < limit:
                result = _tail(file.fileno(), limit - len(result), framed) + result
            inodes.add(inode)
    return result


def join(directory: Path, holder: Process, *, whole: bool = False, framed: bool = False) -> tuple[socket.socket, bytes]:
    """A connection to the streams, and the output before its first, as of `recent`.

    conmon serves what is ready in an order of its own: connections, commands, output. So if it finds a connection and
    the command to begin a new log together, the old log ends exactly where the connection begins.
    Raises ConnectionRefusedError or FileNotFoundError when conmon has ended.
    """
    with _locked(directory):
        conmon.settle(directory)
        with _paused(holder):
            connection = conmon.connect(directory)
            try:
                mark = _close(directory)
            except BaseException:
                connection.close()
                raise
        before = ("log.old",) if _fold(directory, mark) else NAMES
        return connection, recent(directory, whole=whole, framed=framed, names=before)


def trim(directory: Path) -> None:
    """Begin a new log when this one is long, and put away one that was closed late."""
    with contextlib.suppress(FileNotFoundError):
        if (directory / "log").stat().st_size > KEEP:
            with _locked(directory):
                _fold(directory, _close(directory))
        elif (directory / "log.closed").exists():
            with _locked(directory):
                _put_away(directory)


def _close(directory: Path) -> int:
    """Tell conmon to begin a new log; the inode of the one that it closes."""
    _put_away(directory)
    with contextlib.suppress(FileExistsError):
        os.link(directory / "log", directory / "log.closed")
    conmon.command(directory, "2 0 0\n")
    return (directory / "log").stat().st_ino


def _fold(directory: Path, closed: int) -> bool:
    """Wait for the new log, and put the closed one behind `log.old`.

    False when there is none yet: output waits for a reader who does not read, so that nothing else happens either, or
    the machine is very busy. It is then put away later.
    """
    deadline = time.monotonic() + PATIENCE
    while (directory / "log").stat().st_ino == closed:
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    _put_away(directory)
    return True


def _put_away(directory: Path) -> None:
    """Put a closed log behind `log.old`, of which the last KEEP bytes stay, unless conmon still writes to it."""
    closed, old = directory / "log.closed", directory / "log.old"
    try:
        if closed.stat().st_ino == (directory / "log").stat().st_ino:
            return
    except FileNotFoundError:
        return
    text = _end(closed, KEEP)
    whole = closed.stat().st_size <= KEEP
    if whole:
        before = _end(old, KEEP - len(text))
        whole = not old.exists() or old.stat().st_size == len(before)
        text = before + text
    temporary = directory / "log.new"
    temporary.write_bytes(text if whole else text.partition(b"\n")[2])
    temporary.replace(old)
    closed.unlink()


def recent(directory: Path, *, whole: bool = False, framed: bool = False, names: Iterable[str] = NAMES) -> bytes:
    """The last REPLAY bytes of output, from the beginning of a line if there is one in LINE more bytes.

    whole: all that is kept. framed: as of `Sandboxes.logs`.
    """
    if whole:
        return tail(directory, sys.maxsize, framed=framed, names=names)
    return _whole_lines(tail(directory, REPLAY + LINE, names=names))


def _whole_lines(text: bytes) -> bytes:
    if len(text) <= REPLAY:
        return text
    start = text.find(b"\n", 0, len(text) - REPLAY) + 1
    return text[start or -REPLAY :]


def _end(path: Path, limit: int) -> bytes:
    """The last bytes of a file, none of one that is not there."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
            return file.read(limit)
    except FileNotFoundError:
        return b""


def _tail(fd: int, limit: int, framed: bool) -> bytes:
    """The last `limit` bytes of output in one file, reading no more of it than needed, a block at a time."""
    pieces: list[bytes] = []
    missing, end, rest = limit, os.fstat(fd).st_size, b""
    while end > 0 and missing > 0:
        start = max(0, end - BLOCK)
        text = os.pread(fd, end - start, start) + rest
        line = text.find(b"\n") + 1 if start else 0  # what is before it began in the block before
        pieces.append(payload(text[line:], framed=framed) if line or not start else b"")
        rest = text[:line] if line or not start else text
        missing -= len(pieces[-1])
        end = start
    text = b"".join(reversed(pieces))
    return text if framed else text[-limit:] if limit else b""


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _paused(holder: Process) -> Iterator[None]:
    """conmon, stopped. Should we be killed here, the next instance of the driver wakes it."""
    holder.kill(signal.SIGSTOP)
    try:
        deadline = time.monotonic() + PATIENCE
        while holder.alive() and not holder.stopped() and time.monotonic() < deadline:
            time.sleep(PAUSE / 10)
        yield
    finally:
        holder.kill(signal.SIGCONT)
