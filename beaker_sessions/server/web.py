"""The server's sockets and connections: where it listens, who connects, and how long anything may take.

Owns deadlines and what the kernel says of a peer; whether one may stay is `gate`'s, what is answered the application's.
On the Unix socket, programs of this machine know that it is the server which answers: see `transport`.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import ipaddress
import logging
import os
import resource
import socket
import stat
import struct
import time
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import Error
from ..settings import ServerSettings
from ..transport import holder, socket_path
from . import gate
from .subordinate import Subordinate

HEADER = 10.0  # seconds for the header of a request, from its first byte or from connecting
BODY = 60.0  # and for its body
IDLE = 60.0  # between two requests
REST = 5.0  # and for the rest of a body that was answered before it had come
READ = 60.0  # for whoever asked to read the answer, but for what the kernel keeps
LOOK = 1.0  # between two looks at all of them
AGAIN = 3.0  # between two attempts to have the TCP port that somebody else holds
OWN = 128  # descriptors that are no connections
NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST = 4, 20, 1  # linux/netlink.h, linux/sock_diag.h
ANY_STATE = NO_COOKIE = 0xFFFFFFFF  # linux/inet_diag.h
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
subordinate_ids = Subordinate()
log = logging.getLogger(__name__)


class Connection(H11Protocol):
    """One, with deadlines. uvicorn itself closes those that send nothing after an answer."""

    gate: gate.Gate  # of the server, set by `serve`

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._header: float | None = time.monotonic()  # since when one is awaited or half there
        self._body = self._unread = None  # type: float | None
        self._request: Any = None  # whose body that is
        self._is_executor = False
        self.peer = _peer(transport)
        self.app_state = {**self.app_state, "connection": self}
        super().connection_made(transport)
        stays, victim = self.gate.admit(self)
        if victim is not None:
            victim.cut_off()  # type: ignore[attr-defined]
        if not stays:
            transport.write(FULL)
            transport.close()
        else:
            self.gate.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.gate.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._header is None and self.conn.their_state is h11.IDLE:
            self._header = time.monotonic()
        super().data_received(data)
        self._owed()

    def on_response_complete(self) -> None:
        answered = self.cycle
        super().on_response_complete()  # which begins with what had come behind it
        self._owed()
        if self.cycle is answered and self._body is not None:
            self._body = time.monotonic() - BODY + REST

    def _owed(self) -> None:
        """Note since when the peer owes the rest of a header or of a body, as far as h11 has read."""
        state, now = self.conn.their_state, time.monotonic()
        half = state is h11.IDLE and bool(self.conn.trailing_data[0])
        self._header = (self._header or now) if half else None
        if state is not h11.SEND_BODY:
            self._body = None
        elif self._body is None or self._request is not self.cycle:
            self._body = now
        self._request = self.cycle
        if state is h11.IDLE and not half and self.timeout_keep_alive_task is None:
            # The rest of a body that was answered before: no answer comes after it, with which uvicorn would count.
            self.timeout_keep_alive_task = self.loop.call_later(IDLE, self.timeout_keep_alive_handler)

    @property
    def gone(self) -> bool:
        """Whether nobody is left to be answered."""
        return self.transport.is_closing()

    @property
    def waiting(self) -> float | None:
        if self._is_executor:
            return None
        if self._header is not None:
            return self._header
        if self._body is not None:
            return self._body
        answered = self.cycle is None or self.cycle.response_complete
        return time.monotonic() if answered else None  # kept alive: goes after those that are half said

    def executor(self) -> None:
        """What was asked came with an executor's token."""
        self._is_executor = True
        self.gate.executor(self.peer)

    def cut_off(self) -> None:
        self.gate.remove(self)
        self.transport.abort()

    def look(self, now: float) -> None:
        """Cut it off if something took too long."""
        # Also when it is closed: what is still to be sent keeps it.
        self._unread = (self._unread or now) if self.transport.get_write_buffer_size() else None
        deadlines = ((self._header, HEADER), (self._body, BODY), (self._unread, READ))
        if any(begin is not None and now - begin > limit for begin, limit in deadlines):
            self.cut_off()


class Server(uvicorn.Server):
    """uvicorn, which lets open pages go when it shall end, and looks at the deadlines."""

    def __init__(self, app: FastAPI, gate: gate.Gate, awaited: ServerSettings | None = None) -> None:
        config = uvicorn.Config(
            app,
            http=type("Connection", (Connection,), {"gate": gate}),
            ws="none",
            log_config=None,
            access_log=False,
            timeout_keep_alive=IDLE,  # type: ignore[arg-type]
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        super().__init__(config)
        self._app, self.gate, self._looked = app, gate, 0.0
        self._awaited, self._tried, self._said = awaited, 0.0, ""  # settings with a TCP port that somebody holds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.state.changes.close()
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        now = time.monotonic()
        if now - self._looked >= LOOK:
            self._looked = now
            for connection in list(self.server_state.connections):
                connection.look(now)  # type: ignore[union-attr]
        if self._awaited and now - self._tried >= AGAIN:
            self._tried = now
            await self._try(self._awaited)
        return await super().on_tick(counter)

    async def _try(self, settings: ServerSettings) -> None:
        """Listen at the TCP port, if it has become free."""
        try:
            sockets = _listen_tcp(settings)
        except OSError as error:
            if (why := _taken(settings, error)) != self._said:
                log.error("%s: only programs of this machine reach the server until that ends (see `ss -ltnp`)", why)
            self._said = why
            return
        self._awaited = None
        loop, kind, state = asyncio.get_running_loop(), self.config.http_protocol_class, self.lifespan.state
        for one in sockets:  # as uvicorn does with those that it is given
            made = functools.partial(kind, config=self.config, server_state=self.server_state, app_state=state)  # type: ignore[call-arg]
            self.servers.append(await loop.create_server(made, sock=one, backlog=self.config.backlog))


def serve(app: FastAPI, settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT. Port 0 takes a free one, which the log names. Raises Error if it cannot."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = max(min(settings.connections_all, hard - settings.connections_each - OWN), settings.connections_each)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are of what anybody may send
    sockets, awaited = listen(settings)
    Server(app, gate.Gate(settings.connections_each, most), awaited).run(sockets)


def listen(settings: ServerSettings) -> tuple[list[socket.socket], ServerSettings | None]:
    """TCP sockets and, as root, the Unix socket. A connection to the latter waits from its first moment.

    Anybody may have taken the port while the server was not there, which must not keep this machine's programs from it:
    then there is the Unix socket alone, and the settings by which `Server` tries for the port. Raises Error.
    """
    listening: list[socket.socket] = []
    awaited = None
    try:
        listening = _listen_tcp(settings)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or os.geteuid() != 0:
            hint = "is another server running there, or another program? See `ss -ltnp`, or set --host and --port"
            raise Error("unavailable", _taken(settings, error), hint) from error
        awaited = settings
    port = listening[0].getsockname()[1] if listening else settings.port
    if os.geteuid() == 0:
        path = socket_path(settings.sockets, port)
        try:
            listening.append(_listen_locally(Path(path)))
        except Error:
            for one in listening:
                one.close()
            raise
        log.info("listening at %s", path)
    else:
        log.warning("no Unix socket, which only root's server has: programs must name this address as an insecure one")
    return listening, awaited


def _listen_tcp(settings: ServerSettings) -> list[socket.socket]:
    """All or none. Raises OSError."""
    listening: list[socket.socket] = []
    port = settings.port
    try:
        found = socket.getaddrinfo(settings.host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, _, _, _, address in found:
            listening.append(socket.create_server((address[0], port, *address[2:]), family=family))
            port = listening[0].getsockname()[1]
    except OSError:
        for one in listening:
            one.close()
        raise
    log.info("listening at %s", ", ".join(f"{one.getsockname()[0]} port {port}" for one in listening))
    return listening


def _taken(settings: ServerSettings, error: OSError) -> str:
    uid = holder(settings.port) if error.errno == errno.EADDRINUSE else None
    by = "" if uid is None else f", by a program of uid {uid}"
    return f"cannot listen at {settings.host}:{settings.port}: {error.strerror}{by}"


def _listen_locally(path: Path) -> socket.socket:
    """Raises Error when others than root could put a socket there, or another server has it."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        found = path.parent.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != 0 or found.st_mode & 0o022:
            raise Error(
                "forbidden", f"others than root can write to {path.parent}", f"chmod 755 {path.parent}, as root's"
            )
        _claim(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        new.unlink(missing_ok=True)
        listening.bind(str(new))
        new.chmod(0o666)  # who connects is known by their uid, and who asks by their token
        listening.listen(socket.SOMAXCONN)
        new.rename(path)  # nobody ever meets one that does not listen
    except OSError as error:
        raise Error("unavailable", f"cannot listen at {path}: {error.strerror}", "mend that, or set sockets") from error
    return listening


def _claim(path: Path) -> None:
    """Have the name of a socket as long as this process lives. Raises OSError, and Error when another has it."""
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # never closed: with it the lock would go
    except BlockingIOError as error:
        os.close(lock)
        hint = "stop it, or set another port or other sockets"
        raise Error("unavailable", f"another server serves {path}", hint) from error


def _peer(transport: asyncio.Transport) -> str:
    """Whose connection it is, in the gate's words."""
    connection = transport.get_extra_info("socket")
    if connection.family == socket.AF_UNIX:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return _person(struct.unpack("3i", credentials)[1])
    theirs, ours = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if not theirs:
        return gate.STRANGER
    if theirs[0] != ours[0] and not theirs[0].removeprefix("::ffff:").startswith("127."):
        return gate.network(theirs[0])
    uid = owner(theirs, ours)
    return gate.STRANGER if uid is None else _person(uid)


def _person(uid: int) -> str:
    """The peer that a user of this machine is: all subordinate ids of one person are one."""
    owner = subordinate_ids.owner(uid)
    return f"uid {owner}" if owner.isdecimal() else f"uids of {owner}" if owner else f"uid {uid}"


def owner(theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> int | None:
    """The uid of this machine's socket at `theirs` that is connected to `ours`; None when it is closed.

    Asked of the kernel by sock_diag(7), which costs the same however many sockets there are; /proc/net/tcp took 14 ms
    on a machine with a thousand. A socket that nobody holds any more has uid 0 and inode 0.
    """
    (family, here), (_, there) = _packed(theirs[0]), _packed(ours[0])
    pair = struct.pack("!HH16s16s", theirs[1], ours[1], here, there) + struct.pack("=III", 0, NO_COOKIE, NO_COOKIE)
    request = struct.pack("=BBBxI", family, socket.IPPROTO_TCP, 0, ANY_STATE) + pair
    header = struct.pack("=IHHII", 16 + len(request), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as kernel:
            kernel.settimeout(1)
            kernel.send(header + request)
            answer = kernel.recv(65536)
    except OSError as error:
        _cannot_ask(error.strerror)
        return None
    if len(answer) < 88 or struct.unpack_from("=H", answer, 4)[0] != SOCK_DIAG_BY_FAMILY:
        return None
    uid, inode = struct.unpack_from("=II", answer, 80)  # of inet_diag_msg, after its id and three counts
    return int(uid) if inode else None


@functools.cache
def _cannot_ask(reason: str) -> None:
    """Said once, not at each connection."""
    log.warning("cannot ask the kernel whose a connection is (%s): users of this machine count as one", reason)


def _packed(host: str) -> tuple[int, bytes]:
    """Family and bytes of an address, as sock_diag takes them: IPv4 in the first four."""
    ip = ipaddress.ip_address(host.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return (socket.AF_INET if ip.version == 4 else socket.AF_INET6), ip.packed
