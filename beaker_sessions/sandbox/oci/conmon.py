"""conmon: the small program that holds a sandbox's terminal, its log and its exit status, whoever else dies.

Owns: how conmon is started and spoken to; facts from https://github.com/containers/conmon (2.1.6 and newer). In a
process's directory conmon makes `attach` (a SOCK_SEQPACKET), `ctl` (a FIFO of commands), `log` and `exit`.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import socket
import struct
import subprocess
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import Error
from .. import delegated, netns
from ..busybox import BUSYBOX
from . import mounts, programs
from .processes import Process, readable

LOG_SIZE = 8 << 20  # bytes after which conmon begins a new log, see `logs`
PACKET = 32 << 10  # the longest packet that conmon takes
BUSY = 0.3  # seconds that a line for a conmon which does not read waits for the one before
ENTER = (BUSYBOX, "nsenter")  # static, so that it costs half a millisecond
REOPEN, NOTHING = "2 0 0\n", "0 0 0\n"  # lines for `ctl`: begin a new log; what conmon does not know
START = 30.0  # seconds in which a runtime must have made a container
LOOK = 0.02  # seconds between looks at a container that is started for the second time


@dataclass(frozen=True)
class Runtime:
    """An OCI runtime: its program, and the directory where it keeps its state."""

    path: str
    root: Path


def create(
    runtime: Runtime, id: str, directory: Path, root: int, namespace: Path | None, *, tty: bool, stdin: bool
) -> tuple[int, int]:
    """Make the container of the bundle in a directory: the pids of conmon and of the container's init.

    root: a descriptor of the mount namespace that has its root file system. Only the runtime is in it: conmon, which
    stays, would keep all that is mounted there. Raises Error internal with what the runtime said.
    """
    arguments = ["--log-path", f"k8s-file:{directory}/log", "--log-size-max", str(LOG_SIZE), "--no-sync-log"]
    arguments += ["--no-new-keyring"]  # see `keyring`
    # With a terminal, who leaves may come back; a pipe that was closed is at its end.
    arguments += ["--terminal", "--stdin", "--leave-stdin-open"] if tty else ["--stdin"] if stdin else []
    with _pipe() as (reader, writer), _short(directory) as short:
        pipes = {"_OCI_SYNCPIPE": writer}
        netns.inside(namespace, lambda: _run(runtime, id, directory, short, arguments, pipes, root))
        writer.close()
        _hold(directory)
        init = _answer(reader, f"{Path(runtime.path).name} create")
    os.utime(_fifo(runtime, id), (0, 0))
    return int((directory / "conmon.pid").read_text()), init


def execute(
    runtime: Runtime,
    id: str,
    directory: Path,
    namespace: Path | None,
    *,
    tty: bool,
    stdin: bool,
    owner: tuple[int, int],
) -> tuple[int, socket.socket]:
    """Run the process described in `process.json` of a directory in a container: conmon's pid and the streams.

    The process starts only after the streams are connected, so that nothing of its output is lost. owner: the uid and
    gid on this machine of who runs it.
    """
    arguments = ["--exec", "--exec-attach", "--exec-process-spec", f"{directory}/process.json", "--log-path", "none"]
    arguments += ["--terminal", "--stdin", "--leave-stdin-open"] if tty else ["--stdin"] if stdin else []
    with (
        _pipe() as (synced, sync),
        _pipe() as (attached, attach),
        _pipe() as (begun, begin),
        _short(directory) as short,
    ):
        begin.write(b"\0")
        pipes = {"_OCI_SYNCPIPE": sync, "_OCI_ATTACHPIPE": attach, "_OCI_STARTPIPE": begun}
        netns.inside(namespace, lambda: _run(runtime, id, directory, short, arguments, pipes))
        for pipe in (sync, attach, begun):
            pipe.close()
        _answer(attached, "conmon --exec")
        holder = int((directory / "conmon.pid").read_text())
        if not tty:
            give(holder, *owner)
        connection = connect(directory)
        try:
            begin.write(b"\0")
            _hold(directory)
            _answer(synced, f"{Path(runtime.path).name} exec")
        except BaseException:
            connection.close()
            raise
    return holder, connection


def waiting(runtime: Runtime, id: str, init: Process) -> bool:
    """Whether a container that was made has not been started.

    Until then both runc and crun keep a FIFO, but one whose executor was killed is there for longer. The kernel knows:
    a runtime forks the container's init, which executes its first program when it is let go.
    """
    return _fifo(runtime, id).exists() and init.forked()


def begun(runtime: Runtime, id: str) -> bool:
    """Whether a container that has ended had been let go: its init wrote so into the FIFO, which has a time since.

    An executor that is killed between opening the FIFO and that has ended a container that ran nothing.
    """
    with contextlib.suppress(FileNotFoundError):
        return _fifo(runtime, id).stat().st_mtime_ns != 0
    return True


def start(runtime: Runtime, id: str, directory: Path, init: Process) -> None:
    """Let a container run. Does nothing when it runs already. Raises Error internal with what the runtime said.

    May be called again when an earlier call was killed, at any point.
    """
    if not waiting(runtime, id, init):
        return
    fifo = _fifo(runtime, id)
    with contextlib.suppress(FileNotFoundError):
        hooks = json.loads((directory / "config.json").read_text())["hooks"]
        if Path(runtime.path).name == "runc" and "poststart" not in hooks:
            # What `runc start` does, in a tenth of its time: the container's init waits for a reader.
            with mounts.opened(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)) as reader:
                deadline = time.monotonic() + START
                while not readable(reader, LOOK):
                    if not init.forked():
                        return  # it was let go before, and has come to its program by now
                    if time.monotonic() > deadline:
                        raise Error("internal", f"{id} does not start")
                if not os.read(reader, 1):
                    raise Error("internal", f"{id} was killed while it started")
            fifo.unlink()
            return
    done = subprocess.run([runtime.path, f"--root={runtime.root}", "start", id], capture_output=True, check=False)
    if done.returncode != 0 and waiting(runtime, id, init):
        raise Error("internal", f"{id} could not be started: {done.stderr.decode(errors='replace').strip()}")


def _fifo(runtime: Runtime, id: str) -> Path:
    return runtime.root / id / "exec.fifo"


def connect(directory: Path) -> socket.socket:
    """A connection to the streams. Raises ConnectionRefusedError or FileNotFoundError when conmon has ended."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short(directory) as short:
            connection.connect(f"{short}/attach")
    except BaseException:
        connection.close()
        raise
    return connection


def command(directory: Path, text: str, seconds: float = BUSY) -> bool:
    """Write a line to `ctl`. Silent when conmon has ended.

    Of several lines that conmon finds there at once it does the first, as often as there are lines, so each waits until
    the one before has been read, for no longer than so many seconds: whether it was.
    """
    try:
        fd = os.open(directory / "ctl", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # FileNotFoundError, or ENXIO: nobody reads
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        read = _read(fd, seconds)
        os.write(fd, text.encode())
        return read
    except BrokenPipeError:
        return True
    finally:
        os.close(fd)


def settle(directory: Path, seconds: float = BUSY) -> bool:
    """Wait until conmon has read what was written to `ctl`, and has done it but for the last line: whether it has."""
    return command(directory, "", seconds)


def _read(fd: int, seconds: float) -> bool:
    """Wait until nothing in a FIFO is unread, for no longer than so many seconds."""
    deadline = time.monotonic() + seconds
    unread = bytearray(4)
    while time.monotonic() < deadline:
        fcntl.ioctl(fd, termios.FIONREAD, unread)
        if not any(unread):
            return True
        time.sleep(0.0005)
    return False


def give(holder: int, uid: int, gid: int) -> None:
    """Make the pipes of a conmon's standard streams a user's, so that they can open `/dev/stdout` and the like.

    A runtime does so itself, but for users whom its own user namespace does not know the owner of.
    """
    directory = Path(f"/proc/{holder}/fd")
    for entry in directory.iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(entry).startswith("pipe:"):
                os.chown(entry, uid, gid)


def resize(holder: Process, size: tuple[int, int]) -> None:
    """Give the terminal that a conmon holds another size. Silent when it has ended or holds none.

    Not through `ctl`, to which it gets only when it has passed on what the process says.
    """
    if (pidfd := holder.open()) is None:
        return
    with mounts.opened(pidfd), contextlib.suppress(FileNotFoundError):  # it ends at this moment
        for entry in Path(f"/proc/{holder.pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed at this moment
                if os.readlink(entry).endswith("ptmx"):
                    with mounts.opened(holder.descriptor(pidfd, int(entry.name))) as terminal:
                        set_size(terminal, size)


def set_size(terminal: int, size: tuple[int, int]) -> None:
    """size: rows and columns. Raises OSError."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))


def _run(
    runtime: Runtime, id: str, directory: Path, short: str, arguments: Sequence[str], pipes: Mapping[str, io.FileIO],
    root: int = -1,
) -> None:  # fmt: skip
    """Run conmon until it has gone to the background.

    short: of the directory, for sockets made in it. root: the mount namespace that its runtime shall be in.
    """
    try:
        program = programs.sealed(runtime.path)
    except FileNotFoundError as error:
        mend = "install it again: beaker executor doctor"
        raise Error("unavailable", f"{runtime.path} is not there any more", mend) from error
    program, *before = [program] if root < 0 else [*ENTER, f"-m/proc/{os.getpid()}/fd/{root}", program]
    command = [
        "conmon", "--api-version", "1", "--cid", id, "--cuuid", id, "--name", id, "--bundle", str(directory),
        "--runtime", program, *(f"--runtime-arg={word}" for word in before), f"--runtime-arg=--root={runtime.root}",
        "--full-attach",
        "--persist-dir", str(directory), "--conmon-pidfile", f"{directory}/conmon.pid",
        "--container-pidfile", f"{directory}/init.pid", "--log-level", "error", *arguments,
    ]  # fmt: skip
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "TMPDIR": short,
        **{name: str(pipe.fileno()) for name, pipe in pipes.items()},
    }
    descriptors = [pipe.fileno() for pipe in pipes.values()]
    try:
        done = subprocess.run(  # where it works it leaves a file `oom` when memory runs out
            command, cwd=directory, env=environment, pass_fds=descriptors, stdin=subprocess.DEVNULL,
            capture_output=True, check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Error("unavailable", "conmon is not installed", "apt-get install conmon") from error
    if done.returncode != 0:
        raise Error("internal", f"conmon ended with {done.returncode}: {done.stderr.decode(errors='replace').strip()}")


def _hold(directory: Path) -> None:
    """Take conmon out of the executor's group, while the runtime works: moving a process may take milliseconds."""
    if delegated.holders():
        delegated.hold(int((directory / "conmon.pid").read_text()))


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """Another name of a directory, because the address of a socket holds no more than 107 bytes."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)


@contextlib.contextmanager
def _pipe() -> Iterator[tuple[io.FileIO, io.FileIO]]:
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as reader, open(write, "wb", buffering=0) as writer:
        yield reader, writer


def _answer(pipe: io.FileIO, what: str) -> int:
    """The number in conmon's next line: `{"pid": …}` or `{"data": …}`, negative with a `message` after a failure."""
    line = b""
    deadline = time.monotonic() + START
    while b"\n" not in line:
        if not readable(pipe.fileno(), deadline - time.monotonic()):
            raise Error("internal", f"{what} took more than {START:.0f} seconds")
        if not (chunk := pipe.read(65536)):
            raise Error("internal", f"{what} failed without a word")
        line += chunk
    answer = json.loads(line.partition(b"\n")[0])  # what a process that has ended already says comes next
    number = int(answer.get("pid", answer.get("data", -1)))
    if number < 0:
        raise Error("internal", f"{what} failed: {complaint(str(answer.get('message', '')))}")
    return number


def complaint(text: str) -> str:
    """The last line of a runtime's complaint, which is in logfmt or plain."""
    lines = text.strip().splitlines() or ["without a word"]
    return lines[-1].partition("level=error msg=")[2].strip('"') or lines[-1]


def ended() -> socket.socket:
    """A connection like one to a conmon that has ended: nothing comes, and nothing can be said."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    return ours
