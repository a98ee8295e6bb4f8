"""The program that serves one session's published ports: a process of its own, which outlives the executor.

Owns: the copying between the machine's ports and the session's servers. It is handed listening sockets of the machine
that are bound already, and makes its own sockets inside the session's network namespace, so it needs no rule of a
firewall to get there. It ends by itself when the session's first process ends. Must import nothing of the project and
little else, because one runs for each session that publishes; must keep no privilege of the root who starts it.

    python3 -I -S forwarder.py SESSION PIDFD SOCKET:PORT...

CGROUPS in the environment: files of the cgroups that it moves to, out of the executor's, with colons between.
PIDFD: of the session's first process. SOCKET: a descriptor, PORT: to connect to inside. It answers by its exit status
once all is served: the rest goes on in the background.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import sys
import time

NOBODY = 65534
CONNECTIONS = 1024  # at once
SHARE = 512  # of them, of one address; /64 of IPv6
DESCRIPTORS = 6  # that a connection may need: two sockets, and a pipe for each direction that waits
PIPE = 1 << 20  # bytes
ROUNDS = 4  # pipes that one direction may fill before others have their turn
SPARE = 4  # empty pipes that are kept
PAUSE = 0.2  # seconds without accepting, after the machine had no descriptor left
DRAIN = 1.0  # seconds for what the session wrote last
ACCEPTS = 16  # connections taken at once
SYN_RETRIES = 2  # 7 s, should a server's backlog be full
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

CLONE_NEWNET, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 0x40000000, 4, 38
SPLICE_MOVE, SPLICE_NONBLOCK = 1, 2  # splice(2)


class Half:
    """One direction of a connection. pipe: with `held` bytes that the destination did not take yet."""

    __slots__ = ("done", "held", "pipe", "source", "target")

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target, self.pipe, self.held, self.done = source, target, (-1, -1), 0, False


class Connection:
    """outside: of whoever called. inside: of the session's server, tried at these addresses one after the other."""

    __slots__ = ("addresses", "halves", "inside", "outside", "remote")

    def __init__(self, outside: socket.socket, remote: bytes, addresses: list[tuple[int, str, int]]) -> None:
        self.outside, self.remote, self.addresses = outside, remote, addresses
        self.inside: socket.socket | None = None
        self.halves: tuple[Half, ...] = ()


class Forwarder:
    def __init__(self, session: int, listeners: dict[socket.socket, int], most: int) -> None:
        self.session, self.most = session, most
        self.listeners = {listener.fileno(): (listener, port) for listener, port in listeners.items()}
        self.poll = select.epoll()
        self.masks: dict[int, int] = {}
        self.connections: dict[int, Connection] = {}  # by the descriptors of both its sockets
        self.shares: dict[bytes, int] = {}
        self.pipes: list[tuple[int, int]] = []
        self.closing: list[socket.socket] = []  # at the end of a round, lest an event be taken for a new socket's
        self.resume = 0.0
        self.end = 0.0

    def run(self) -> None:
        self.watch(self.session, select.EPOLLIN)
        self.listen(True)
        while not self.end or (self.connections and time.monotonic() < self.end):
            timeout = 0.1 if self.end or self.resume else -1
            events = self.poll.poll(timeout)
            if self.resume and time.monotonic() > self.resume:
                self.resume = 0.0
                self.listen(True)
            for fd, event in events:
                if fd == self.session:
                    self.end = time.monotonic() + DRAIN
                    self.watch(fd, 0)
                    self.listen(False)
                    for listener, _ in self.listeners.values():
                        listener.close()
                elif connection := self.connections.get(fd):
                    self.serve(connection, fd, event)
            for fd, _ in events:
                if fd in self.listeners and not self.end:
                    self.accept(*self.listeners[fd])
            while self.closing:
                self.closing.pop().close()
        for connection in set(self.connections.values()):
            self.finish(connection, reset=True)
        while self.closing:
            self.closing.pop().close()

    def listen(self, on: bool) -> None:
        for fd in self.listeners:
            self.watch(fd, select.EPOLLIN if on else 0)

    def watch(self, fd: int, mask: int) -> None:
        """A descriptor without a mask is not registered: epoll tells of errors unasked, and again and again."""
        before = self.masks.get(fd, 0)
        if mask and before and mask != before:
            self.poll.modify(fd, mask)
        elif mask and not before:
            self.poll.register(fd, mask)
        elif before and not mask:
            self.poll.unregister(fd)
        self.masks[fd] = mask
        if not mask:
            del self.masks[fd]

    def accept(self, listener: socket.socket, port: int) -> None:
        for _ in range(ACCEPTS):
            try:
                outside, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in NO_ROOM:
                    self.listen(False)
                    self.resume = time.monotonic() + PAUSE
                    return
                continue  # it has gone again
            remote = caller(outside.family, address[0])
            if len(self.connections) >= 2 * self.most or self.shares.get(remote, 0) >= self.most * SHARE // CONNECTIONS:
                reset(outside)
                continue
            self.shares[remote] = self.shares.get(remote, 0) + 1
            loopback = [(socket.AF_INET, "127.0.0.1", port), (socket.AF_INET6, "::1", port)]
            connection = Connection(outside, remote, [*loopback, (socket.AF_UNSPEC, "", port)])
            self.connections[outside.fileno()] = connection
            try:
                outside.setblocking(False)
                outside.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in ((socket.TCP_KEEPIDLE, 600), (socket.TCP_KEEPINTVL, 60), (socket.TCP_NODELAY, 1)):
                    outside.setsockopt(socket.IPPROTO_TCP, option, value)
                self.connect(connection)
            except OSError:
                self.finish(connection, reset=True)

    def connect(self, connection: Connection) -> None:
        """Try the next address inside; without one left, the caller is refused."""
        if connection.inside:
            self.drop(connection.inside)
            connection.inside = None
        while connection.addresses:
            family, address, port = connection.addresses.pop(0)
            try:
                if not address:
                    connection.addresses = [(*own, port) for own in addresses()]
                    continue
                inside = socket.socket(family, socket.SOCK_STREAM)
            except OSError:
                continue
            inside.setblocking(False)
            inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, SYN_RETRIES)
            inside.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if inside.connect_ex((address, port)) in (0, errno.EINPROGRESS):
                connection.inside = inside
                self.connections[inside.fileno()] = connection
                self.watch(inside.fileno(), select.EPOLLOUT)
                return
            inside.close()
        self.finish(connection, reset=True)

    def serve(self, connection: Connection, fd: int, event: int) -> None:
        inside = connection.inside
        assert inside
        try:
            if not connection.halves:
                if not connected(inside):
                    self.connect(connection)
                    return
                connection.halves = (Half(connection.outside, inside), Half(inside, connection.outside))
            for half in connection.halves:
                reads, writes = half.source.fileno() == fd, half.target.fileno() == fd
                if not half.done and ((reads and event & ~select.EPOLLOUT) or (writes and half.held)):
                    self.pump(half)
            there, back = connection.halves
            for fd, out, into in ((connection.outside.fileno(), there, back), (inside.fileno(), back, there)):
                reading = select.EPOLLIN if not out.done and not out.held else 0
                self.watch(fd, reading | (select.EPOLLOUT if into.held and not into.done else 0))
        except OSError:  # its source was reset, or the machine has nothing left
            self.finish(connection, reset=True)
            return
        if there.done and back.done:
            self.finish(connection, reset=False)

    def pump(self, half: Half) -> None:
        """Copy what there is now. Raises OSError when the source fails."""
        source, target = half.source.fileno(), half.target.fileno()
        pipe = half.pipe if half.held else self.pipes.pop() if self.pipes else new_pipe()
        half.pipe = pipe
        for _ in range(ROUNDS):
            if not half.held:
                try:
                    half.held = os.splice(source, pipe[1], PIPE, flags=SPLICE_MOVE | SPLICE_NONBLOCK)
                except BlockingIOError:
                    break
                if not half.held:
                    half.done = True
                    with contextlib.suppress(OSError):  # it is gone; the other half will see that
                        half.target.shutdown(socket.SHUT_WR)
                    break
            try:
                while half.held:
                    half.held -= os.splice(pipe[0], target, half.held, flags=SPLICE_MOVE | SPLICE_NONBLOCK)
            except BlockingIOError:
                return
            except OSError:
                half.done = True  # nobody reads it; what comes the other way is passed on to its end
                return
        half.pipe = (-1, -1)
        self.give_back(pipe)

    def give_back(self, pipe: tuple[int, int]) -> None:
        if len(self.pipes) < SPARE:
            self.pipes.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    def drop(self, sock: socket.socket) -> None:
        self.watch(sock.fileno(), 0)
        del self.connections[sock.fileno()]
        self.closing.append(sock)

    def finish(self, connection: Connection, reset: bool) -> None:
        for sock in (connection.outside, connection.inside):
            if sock:
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
                self.drop(sock)
        for half in connection.halves:
            for fd in half.pipe:
                if fd >= 0:
                    os.close(fd)
            half.pipe = (-1, -1)
        self.shares[connection.remote] -= 1
        if not self.shares[connection.remote]:
            del self.shares[connection.remote]


LOOPBACK = 127  # of 127.0.0.0/8
LINGER_NONE = b"\1\0\0\0\0\0\0\0"  # struct linger: on, 0 seconds, by which a close is a reset


def caller(family: int, address: str) -> bytes:
    """By what connections are counted: all of loopback is one, and so is what one site of IPv6 is given."""
    packed = socket.inet_pton(family, address.partition("%")[0])
    local = address == "::1" or (family == socket.AF_INET and packed[0] == LOOPBACK)
    return b"" if local else packed[:8]


def connected(sock: socket.socket) -> bool:
    """Whether to somebody else: the kernel may call from the very port that nobody serves, which meets itself then."""
    try:
        return not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) and sock.getsockname() != sock.getpeername()
    except OSError:
        return False


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NONE)
    sock.close()


def new_pipe() -> tuple[int, int]:
    pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    with contextlib.suppress(OSError):  # the kernel's bound for one user is reached: it is slower then
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, PIPE)
    return pipe


def addresses() -> list[tuple[int, str]]:
    """The session's own: from which it would call the world. No packet is sent."""
    found = []
    for family, somewhere in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((somewhere, 9))
            found.append((int(family), probe.getsockname()[0]))
    return found


def enter(session: int) -> int:
    """Into the session's network namespace, and out of all privileges: how many connections there may be."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(session, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("0")  # the executor's own is better
    for group in filter(None, os.environ.get("CGROUPS", "").split(os.pathsep)):
        with contextlib.suppress(OSError), open(group, "w") as file:
            file.write("0")  # this process
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = min(hard, CONNECTIONS * DESCRIPTORS + 64)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.chdir("/")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    for option, value in ((PR_SET_NO_NEW_PRIVS, 1), (PR_SET_DUMPABLE, 0)):
        if libc.prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
    return (files - 64) // DESCRIPTORS


def main(arguments: list[str]) -> None:
    session = int(arguments[1])
    listeners = {}
    for pair in arguments[2:]:
        fd, port = pair.split(":")
        listeners[socket.socket(fileno=int(fd))] = int(port)
    most = enter(session)
    for listener in listeners:
        listener.setblocking(False)
        listener.listen(128)
    if os.fork():
        os._exit(0)
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
    Forwarder(session, listeners, most).run()


if __name__ == "__main__":
    main(sys.argv[1:])
