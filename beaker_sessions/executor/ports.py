"""Which TCP ports of this node lead to which session. A port is held like a GPU: by one session, until that is final.

Owns: the choice of free ports, and their sockets from the claim until a forwarder serves them: what was found free is
bound at once, and stays bound. Never with SO_REUSEADDR: with it, a wildcard address may be had beside a program's own
that is bound to loopback alone, and captures its callers.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
import subprocess
import threading
from collections.abc import Iterable, Mapping
from urllib.parse import urlsplit

from ..errors import Error
from ..model import Claim, Request, Session
from ..sandbox import MARK
from ..settings import ExecutorSettings

LOWEST, HIGHEST = 1024, 65535  # those below are for the machine's own services
TRIES = 200  # ports looked at for one that is free, while others wait: of a range that somebody took whole it is enough
USED = (errno.EADDRINUSE, errno.EACCES)
WITHOUT = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # a machine without IPv6

Mapped = tuple[tuple[int, int], ...]  # pairs: of the session, of the node
Sockets = list[tuple[socket.socket, int]]  # each with the session's port


class Ports:
    """choice: from which the node picks. own: ports that no session gets, with whose they are."""

    def __init__(self, choice: range = range(20000, 30000), own: Mapping[int, str] | None = None) -> None:
        self.choice, self.own = choice, own or {}
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Mapped, Sockets]] = {}

    def check(self, request: Request, sessions: Iterable[Session]) -> None:
        """Raises Error invalid or conflict when a port of the node that was asked for cannot be had.

        sessions: all that are not final; one that waits holds the ports that it asked for, too.
        """
        holders = {port: session.id for session in sessions for port in _held(session)}
        for own, port in request.ports:
            hint = f"choose another, or leave it to the node: --port {own}"
            if 0 < port < LOWEST:
                raise Error("invalid", f"--port {port}:{own}: ports below {LOWEST} are the machine's own", hint)
            if port in holders or port in self.own:
                whose = self.own.get(port) or f"session {holders[port]}"
                raise Error("conflict", f"--port {port}:{own}: port {port} of this node is used by {whose}", hint)
            if port:
                if not (found := _bound(own, port)):
                    raise _used(own, port)
                _close(found)

    def settle(self, request: Request) -> None:
        """Before `check`, and without a lock that anybody else needs: free what only lingers of the ports asked for."""
        for own, port in request.ports:
            if port >= LOWEST:
                with contextlib.suppress(Error):
                    _close(_named(own, port))

    def pick(self, id: str, request: Request, sessions: Iterable[Session]) -> Mapped:
        """The claim for the ports of `request`: those of the node that it asked for, else free ones at random.

        They are bound, and held for the session `id` until `take`. One that was asked for and is another program's by
        now is claimed all the same: `take` says what is wrong. Raises Error unavailable when no port is free.
        """
        if not request.ports:
            return ()
        taken = {port for session in sessions for port in _held(session)} | set(self.own)
        mapped, sockets = [], Sockets()
        try:
            for own, wanted in request.ports:
                if wanted:
                    sockets += _bound(own, wanted)
                else:
                    wanted, found = self._any(own, taken)
                    sockets += found
                mapped.append((own, wanted))
                taken.add(wanted)
        except BaseException:
            _close(sockets)
            raise
        with self._lock:
            self._held[id] = (tuple(mapped), sockets)
        return tuple(mapped)

    def take(self, id: str, request: Request, claim: Claim, sessions: Iterable[Session]) -> tuple[Mapped, Sockets]:
        """The bound sockets of a claim, for whoever closes them, and the ports as they are: after a restart of the
        executor, one that was picked and is another's by now is replaced by another.

        Raises Error conflict when a port that was asked for is another program's.
        """
        with self._lock:
            mapped, sockets = self._held.pop(id, ((), Sockets()))
        named = dict(request.ports)
        taken = {port for session in sessions for port in _held(session)} | set(self.own)
        bound = {sock.getsockname()[1] for sock, _ in sockets}
        result = []
        try:
            for own, port in mapped or claim.ports:
                if port not in bound:
                    try:
                        sockets += _named(own, port)
                    except Error:
                        if named.get(own):
                            raise
                        port, found = self._any(own, taken)
                        sockets += found
                        taken.add(port)
                result.append((own, port))
        except BaseException:
            _close(sockets)
            raise
        return tuple(result), sockets

    def drop(self, live: Iterable[str]) -> None:
        """Give up what is held for sessions other than these."""
        with self._lock:
            gone = [self._held.pop(id) for id in self._held.keys() - set(live)]
        for _, sockets in gone:
            _close(sockets)

    def _any(self, own: int, taken: set[int]) -> tuple[int, Sockets]:
        left = [port for port in self.choice if port not in taken]
        for port in random.sample(left, min(TRIES, len(left))):
            if found := _bound(own, port):
                return port, found
        why = f"no port of {self.choice[0]}-{self.choice[-1]} was found free on this node"
        raise Error("unavailable", why, "try again when other sessions or programs have ended")


def of(settings: ExecutorSettings) -> Ports:
    """Raises Error invalid for a range that is none."""
    first, _, last = settings.port_range.partition("-")
    choice = range(int(first), int(last) + 1) if first.isdecimal() and last.isdecimal() else range(0)
    if not choice or choice[0] < LOWEST or choice[-1] > HIGHEST:
        why = f"portRange: {settings.port_range!r} is no range of ports from {LOWEST} to {HIGHEST}"
        raise Error("invalid", why, "for example 20000-29999")
    own = {urlsplit(settings.address).port: "the server"}
    own[urlsplit(f"//{settings.metrics}").port] = "this node's metrics"
    return Ports(choice, {port: whose for port, whose in own.items() if port})


def bind(mapped: Mapped) -> Sockets:
    """The ports of a session whose forwarder died. Raises Error conflict when one is another program's by now."""
    sockets = Sockets()
    try:
        for own, port in mapped:
            sockets += _named(own, port)
    except BaseException:
        _close(sockets)
        raise
    return sockets


def _named(own: int, port: int) -> Sockets:
    """May run a program: never under a lock that others need. Raises Error conflict."""
    if found := _bound(own, port):
        return found
    # Connections of a session that just ended may linger for a minute; they are nobody's.
    subprocess.run(["ss", "-K", "-t", "-n", "state", "time-wait", "sport", "=", f":{port}"], capture_output=True)
    if found := _bound(own, port):
        return found
    raise _used(own, port)


def _used(own: int, port: int) -> Error:
    why = f"--port {port}:{own}: port {port} of this node is used by another program"
    return Error("conflict", why, f"choose another, or leave it to the node: --port {own}")


def _bound(own: int, port: int) -> Sockets:
    """Sockets of all addresses of this machine, in IPv4 and IPv6; none when anybody uses the port on any of them."""
    sockets = Sockets()
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sockets.append((sock, own))
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            with contextlib.suppress(PermissionError):  # who may not do this, may not set up the firewall either
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
            sock.bind((address, port))
        except OSError as error:
            if family == socket.AF_INET6 and error.errno in WITHOUT:
                sockets = sockets[:1]
            else:
                _close(sockets)
                if error.errno in USED:
                    return []
                raise
    return sockets


def _close(sockets: Sockets) -> None:
    for sock, _ in sockets:
        sock.close()


def _held(session: Session) -> set[int]:
    return {port for _, port in (session.claim.ports if session.claim else session.request.ports)} - {0}
