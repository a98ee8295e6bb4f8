"""Who is calling, and whether the token they show is theirs. The rule of the door; knows no sessions.

Two witnesses must agree: the kernel says which Unix user is at the other end of the socket, the server says whose token
it is. So a stolen token does not open another person's home, and a Unix login alone spends nobody's budget.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from .. import ids
from ..client import Client
from ..errors import Error
from ..transport import Endpoint
from .ledger import Ledger

SO_PEERPIDFD = 77  # asm-generic/socket.h
PATIENCE = 3.0  # seconds that the server is given to answer
AWAY = 10.0  # seconds that a server which did not answer is left alone, so that nobody here waits for it each time
FRESH = 4.0  # seconds that the server's word on a token is good for: a revoked one is refused within 5 s
VOUCHED = 1000  # tokens that the server is asked about at each heartbeat
LATELY = timedelta(days=7)  # how long an account seen by the server may start sessions while the server is away


@dataclass(frozen=True)
class Peer:
    """The process at the other end of a unix socket, as the kernel tells it."""

    pid: int
    uid: int
    gid: int


def peer(connection: socket.socket) -> Peer:
    """Raises Error forbidden for a process in a sandbox, even if the socket was mounted into it.

    A sandbox's processes live in other namespaces than the host's. A mount namespace alone is no sandbox: services with
    a private /tmp have one. To be asked as soon as it has connected: its pid may be used again. Where the kernel holds
    the process itself (Linux 6.5), no other can be taken for it.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    result = Peer(*struct.unpack("3i", credentials))
    try:
        with closing(_held(connection, result.pid)) as process:
            inside = [n for n in ("user", "pid") if _namespace(str(result.pid), n) != _namespace("self", n)]
            signal.pidfd_send_signal(process.fileno(), 0)  # it is still there, so that is what we have read about
    except OSError:
        # Gone already, or its pid has no meaning here (0: it is in a namespace that we cannot see).
        inside = ["pid"]
    if inside:
        raise Error(
            "forbidden", "the executor does not serve processes inside a sandbox", "run this on the machine itself"
        )
    return result


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


class Access:
    """Turns tokens into accounts by asking the server, with a short memory, and a long one for when it is away."""

    def __init__(self, ledger: Ledger, server: Endpoint, accounts: Mapping[str, str]) -> None:
        self._ledger, self._server, self._accounts = ledger, server, accounts
        self._known: dict[str, tuple[float, dict]] = {}
        self._away_until = 0.0
        self._lock = threading.Lock()

    def account(self, token: str) -> dict:
        """The account (REST JSON) of a token.

        Raises Error unauthorized for a wrong, revoked or expired one, unavailable when nobody can say.
        """
        if not ids.looks_like_token(token):
            raise Error(
                "unauthorized",
                "this is not a valid token" if token else "no token was given",
                "see beaker account token",
            )
        digest = ids.hash_token(token)
        with self._lock:
            checked, account = self._known.get(digest, (0.0, {}))
        if account and time.monotonic() - checked < FRESH:
            return account
        remembered = self._ledger.vouched(digest)
        if remembered and datetime.now(UTC) - remembered[1] > LATELY:
            remembered = None
        if remembered and time.monotonic() < self._away_until:
            return remembered[0]
        try:
            with closing(Client(self._server, token, PATIENCE)) as client:
                account = client.whoami()
        except Error as error:
            if error.code in ("unauthorized", "forbidden"):
                with self._lock:
                    self._known.pop(digest, None)
                self._ledger.refuse(digest)
                raise
            if error.code != "unavailable" or not remembered:
                raise
            self._away_until = time.monotonic() + AWAY
            return remembered[0]
        with self._lock:
            known_before = digest in self._known
            self._known[digest] = (time.monotonic(), account)
        if not known_before:
            self._ledger.vouch(digest, account)
        return account

    def vouched(self) -> list[str]:
        """Hashes of the tokens that would be let in while the server is away, the latest first, at most VOUCHED."""
        return self._ledger.vouched_hashes(datetime.now(UTC) - LATELY, VOUCHED)

    def revoke(self, hashes: Iterable[str]) -> None:
        """Tokens with these hashes have ended, says the server: forget them."""
        for digest in hashes:
            with self._lock:
                self._known.pop(digest, None)
            self._ledger.refuse(digest)

    def check(self, token: str, unix_name: str) -> dict:
        """The token's account, which must be the one of this Unix user (the same name, or as the settings map it)."""
        account = self.account(token)
        expected = self._accounts.get(unix_name, unix_name)
        if account["name"] != expected:
            raise Error(
                "forbidden",
                f"this token belongs to the account {account['name']!r}, but you are the Unix user {unix_name!r}",
                f"use a token of the account {expected!r}",
            )
        return account

    def logs(self, token: str, id: str) -> bytes:
        """The output of an ended session, which the server keeps; none where it has not heard of it. Raises Error."""
        with closing(Client(self._server, token, PATIENCE)) as client:
            try:
                return client.get_logs(id)
            except Error as error:
                if error.code == "not_found":
                    return b""
                raise

    def unix_name(self, account: str) -> str:
        """The Unix user whose sessions this account starts here."""
        return next((unix for unix, name in self._accounts.items() if name == account), account)
