"""The output of a sandbox as conmon keeps it, in the format of Kubernetes: `TIME STREAM P|F TEXT`, P without newline.

Owns: the log files of one sandbox, which together never have more than LIMIT bytes. conmon writes `log`. When it is
told to, or has written KEEP bytes, it makes `log.tmp`, writes there from then on, and renames it to `log`, unasked.
So that the one before is kept, it has another name:

    log         what conmon writes
    log.closed  the same file, hence the one before as soon as conmon has begun a new one
    log.tmp     made ahead, so that conmon takes it for the next one
    log.next    the same file: by it is known whether `log` is the next one after `log.closed`, or one still later
    log.old     what was before `log.closed`

That somebody comes back marks a place in the output where their connection begins, so a new one is begun then.
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
from datetime import UTC, datetime
from pathlib import Path

from .. import framed as frame
from . import conmon
from .processes import Process, readable

KEEP = 8 << 20  # bytes of a log file
LIMIT = 5 * KEEP  # of all files of a sandbox: `log`, `.closed`, `.next`, `.old`, and what becomes `.old`
REPLAY = 64 << 10  # bytes of recent output that an attach shows,
LINE = 4 << 10  # and at most so many more, to begin with a line
LOST = "output may be missing here"
BLOCK = 256 << 10  # bytes of a log that are read at once
PATIENCE = 5.0  # seconds for conmon to begin a new file
PAUSE = 0.0005
PASSED_ON = 0.1  # seconds in which conmon has passed on what it has written to a log
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


def begin(directory: Path) -> None:
    """Be ready for conmon to begin a new log, from now on."""
    with _locked(directory):
        _prepare(directory)


def tail(directory: Path, limit: int, *, framed: bool = False) -> bytes:
    """The last `limit` bytes of output. framed: as of `Sandboxes.logs`."""
    try:
        with _locked(directory):
            _put_away(directory)
            return _joined(directory, NAMES, limit, framed)
    except FileNotFoundError:  # removed just now
        return b""


def join(directory: Path, holder: Process, *, whole: bool = False, framed: bool = False) -> tuple[socket.socket, bytes]:
    """A connection to the streams, and the output before its first, as of `recent`.

    conmon serves what is ready in an order of its own: connections, commands, output. So if it finds a connection and
    the command to begin a new log together, the old log ends exactly where the connection begins.
    Raises ConnectionRefusedError or FileNotFoundError when conmon has ended.
    """
    with _locked(directory):
        conmon.settle(directory)
        _put_away(directory)  # so that there is little to do while it is stopped
        with _paused(holder):
            _put_away(directory)
            mark = _inode(directory / "log")
            connection = conmon.connect(directory)
            try:
                conmon.command(directory, conmon.REOPEN)
            except BaseException:
                connection.close()
                raise
        begun = _begun(directory, mark, connection)
        names = list(NAMES[1:] if begun else NAMES)
        if begun and not _follows(directory) and not _came(connection, directory / "log.next"):
            # When it was stopped it was at some output, with which it had written KEEP bytes.
            names.insert(0, "log.next")
        text = _recent(directory, names, whole=whole, framed=framed)
        _put_away(directory)
        return connection, text


def trim(directory: Path) -> bool:
    """Put away a log that was closed, and begin a new one when this is long: an earlier version's conmon does not.

    False when somebody is at it just now, who may take seconds: it is still to be done.
    """
    try:
        log = (directory / "log").stat()
        if log.st_size > KEEP:
            with _locked(directory, fcntl.LOCK_NB):
                _put_away(directory)
                mark = _inode(directory / "log")
                conmon.command(directory, conmon.REOPEN)
                if _begun(directory, mark):
                    _put_away(directory)
        elif log.st_ino != _inode(directory / "log.closed"):
            with _locked(directory, fcntl.LOCK_NB):
                _put_away(directory)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # removed just now
        pass
    return True


def _begun(directory: Path, closed: int, connection: socket.socket | None = None) -> bool:
    """Wait for the new log that conmon was told to begin: only after that it reads a next line, or serves a connection.

    False when there is none yet: output waits for a reader who does not read, so that nothing else happens either, or
    the machine is very busy. It is then put away later.
    """
    deadline = time.monotonic() + PATIENCE
    if not conmon.settle(directory, PATIENCE):
        return False
    conmon.command(directory, conmon.NOTHING)
    while not conmon.settle(directory, PAUSE) and time.monotonic() < deadline:
        if connection and readable(connection.fileno(), 0):
            break
    return _inode(directory / "log") != closed


def _came(connection: socket.socket, log: Path) -> bool:
    """Whether a log begins with what came first by a connection, hence was begun after it."""
    if not readable(connection.fileno(), PASSED_ON):
        return False
    first = connection.recv(conmon.PACKET + 1, socket.MSG_PEEK)[1:]
    with open(log, "rb") as file:
        text = payload(file.read(BLOCK).rpartition(b"\n")[0] + b"\n")
    return text[: len(first)] == first[: len(text)]


def _follows(directory: Path) -> bool:
    """Whether `log` is the next one after `log.closed`."""
    return _inode(directory / "log") == _inode(directory / "log.next")


def _put_away(directory: Path) -> None:
    """Put a closed log behind `log.old`, of which the last KEEP bytes stay, unless conmon still writes to it."""
    closed, old, following = directory / "log.closed", directory / "log.old", directory / "log.next"
    log = _inode(directory / "log")
    if _inode(closed) not in (log, 0):
        follows = _follows(directory) or not following.exists()  # an earlier version made none
        if follows and closed.stat().st_size > KEEP // 2:
            closed.replace(old)
        else:
            used = [closed] if follows or _inode(following) == _inode(directory / "log.tmp") else [closed, following]
            _append(old, used, lost=not follows)
            closed.unlink()
    _prepare(directory)


def _prepare(directory: Path) -> None:
    """Give names to the log that is and to the one that comes, while conmon may begin others."""
    closed, following, temporary = directory / "log.closed", directory / "log.next", directory / "log.tmp"
    if not temporary.exists():
        following.unlink(missing_ok=True)
        following.touch(mode=0o600)
        with contextlib.suppress(FileExistsError):  # conmon begins one at this moment
            os.link(following, temporary)
    if not closed.exists():
        os.link(directory / "log", closed)


def _append(old: Path, files: list[Path], *, lost: bool) -> None:
    text = b"".join(_end(file, KEEP) for file in files)
    if lost:
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        text += f"{now} stdout F \r\n{now} stdout F [{LOST}]\r\n".encode()
    before = _end(old, KEEP)
    whole = len(before) + len(text) <= KEEP and sum(_size(file) for file in (old, *files)) <= KEEP
    text = (before + text)[-KEEP:]
    temporary = old.with_name("log.new")
    temporary.write_bytes(text if whole else text.partition(b"\n")[2])
    temporary.replace(old)


def recent(directory: Path, *, whole: bool = False, framed: bool = False) -> bytes:
    """The last REPLAY bytes of output, from the beginning of a line if there is one in LINE more bytes.

    whole: all that is kept. framed: as of `Sandboxes.logs`.
    """
    try:
        with _locked(directory):
            _put_away(directory)
            return _recent(directory, NAMES, whole=whole, framed=framed)
    except FileNotFoundError:  # removed just now
        return b""


def _recent(directory: Path, names: Iterable[str], *, whole: bool, framed: bool) -> bytes:
    if whole:
        return _joined(directory, names, sys.maxsize, framed)
    return _whole_lines(_joined(directory, names, REPLAY + LINE, framed=False))


def _whole_lines(text: bytes) -> bytes:
    if len(text) <= REPLAY:
        return text
    start = text.find(b"\n", 0, len(text) - REPLAY) + 1
    return text[start or -REPLAY :]


def _joined(directory: Path, names: Iterable[str], limit: int, framed: bool) -> bytes:
    """The last bytes of output in files, the latest first, of which several may be one."""
    result, inodes = b"", set()
    for name in names:
        with contextlib.suppress(FileNotFoundError), open(directory / name, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode not in inodes and len(result) < limit:
                result = _tail(file.fileno(), limit - len(result), framed) + result
            inodes.add(inode)
    return result


def _inode(path: Path) -> int:
    """0 for a file that is not there."""
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
def _locked(directory: Path, how: int = 0) -> Iterator[None]:
    """how: LOCK_NB, to raise BlockingIOError while another holds it."""
    fd = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | how)
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
