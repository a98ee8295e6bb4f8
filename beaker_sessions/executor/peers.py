"""Who is at the other end of a unix socket, as the kernel tells it: nothing that is said is believed.

Both questions are to be asked as soon as somebody has connected, because their pid may be used again. Where the kernel
holds the process itself (Linux 6.5), no other can be taken for it.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

from ..errors import Error

SO_PEERPIDFD = 77  # asm-generic/socket.h
NS_GET_PARENT = 0xB702  # ioctl_ns(2)


@dataclass(frozen=True)
class Peer:
    """The process that connected; pid is 0 where it lives in a namespace that we cannot see."""

    pid: int
    uid: int
    gid: int


def credentials(connection: socket.socket) -> Peer:
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return Peer(*struct.unpack("3i", found))


def peer(connection: socket.socket) -> Peer:
    """A process of the machine. Raises Error forbidden for one in a sandbox, even if the socket was mounted there.

    A sandbox's processes live in other namespaces than the host's. A mount namespace alone is no sandbox: services with
    a private /tmp have one.
    """
    result = credentials(connection)
    try:
        with closing(_held(connection, result.pid)) as process:
            inside = [n for n in ("user", "pid") if _namespace(str(result.pid), n) != _namespace("self", n)]
            signal.pidfd_send_signal(process.fileno(), 0)  # it is still there, so that is what we have read about
    except OSError:
        inside = ["pid"]  # gone already, or not to be seen from here
    if inside:
        raise Error(
            "forbidden", "the executor does not serve processes inside a sandbox", "run this on the machine itself"
        )
    return result


def check_inside(connection: socket.socket, init: Callable[[], int | None]) -> None:
    """Raises Error forbidden for a process that is not a session's own.

    Its own are in the pid namespace of its first process, or in one that was made in that. init(): a pidfd of that
    process, which is closed here, None when there is none.
    """
    who = credentials(connection)
    try:
        with ExitStack() as opened:
            process = opened.enter_context(closing(_held(connection, who.pid)))
            own = _identity(opened.enter_context(closing(_own(init))))
            at = opened.enter_context(open(f"/proc/{who.pid}/ns/pid", "rb", buffering=0))
            while _identity(at) != own:
                at = opened.enter_context(closing(io.FileIO(fcntl.ioctl(at, NS_GET_PARENT))))  # EPERM above our own
            signal.pidfd_send_signal(process.fileno(), 0)
    except OSError:
        what = f"process {who.pid} of user {who.uid} is none of this session's"
        raise Error("forbidden", what, "run this in the session itself") from None


def _own(init: Callable[[], int | None]) -> io.FileIO:
    """A session's pid namespace, kept by being open. Raises OSError where that is not known, or is our own."""
    if (descriptor := init()) is None:
        raise ProcessLookupError
    with closing(io.FileIO(descriptor)):
        with open(f"/proc/self/fdinfo/{descriptor}") as about:  # pidfd_open(2): a field `Pid`, -1 when it has ended
            pid = next(line.split()[1] for line in about if line.startswith("Pid:"))
        found = io.FileIO(f"/proc/{pid}/ns/pid")
        try:
            signal.pidfd_send_signal(descriptor, 0)  # it is still there, so that is what we have opened
            with io.FileIO("/proc/self/ns/pid") as ours:
                if _identity(found) == _identity(ours):
                    raise ProcessLookupError
        except BaseException:
            found.close()
            raise
        return found


def _identity(namespace: io.FileIO) -> tuple[int, int]:
    found = os.fstat(namespace.fileno())
    return found.st_dev, found.st_ino


def _held(connection: socket.socket, pid: int) -> io.FileIO:
    """A pidfd of the process at the other end. Raises OSError when it has ended."""
    try:
        fd = connection.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        fd = os.pidfd_open(pid)
    return io.FileIO(fd)


def _namespace(pid: str, name: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{name}")
