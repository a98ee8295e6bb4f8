"""Who is calling, and whether the token they show is theirs. The rule of the door; knows no sessions.

Two witnesses must agree: the kernel says which Unix user is at the other end of the socket, the server says whose token
it is. So a stolen token does not open another person's home, and a Unix login alone spends nobody's budget.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta

from .. import ids
from ..client import Client
from ..errors import Error
from .ledger import Ledger

PATIENCE = 3.0  # seconds that the server is given to answer
AWAY = 10.0  # seconds that a server which did not answer is left alone, so that nobody here waits for it each time
FRESH = 4.0  # seconds that the server's word on a token is good for: a revoked one is refused within 5 s
LATELY = timedelta(days=7)  # how long an account seen by the server may start sessions while the server is away


class Access:
    """Turns tokens into accounts by asking the server, with a short memory, and a long one for when it is away."""

    def __init__(self, ledger: Ledger, address: str, accounts: Mapping[str, str]) -> None:
        self._ledger, self._address, self._accounts = ledger, address, accounts
        self._known: dict[str, tuple[float, dict]] = {}
        self._away_until = 0.0
        self._lock = threading.Lock()

    def is_fresh(self, token: str) -> bool:
        """Whether `account` answers at once, by what the server said just now."""
        with self._lock:
            checked, _ = self._known.get(ids.hash_token(token), (0.0, {}))
        return time.monotonic() - checked < FRESH

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
            with closing(Client(self._address, token, PATIENCE)) as client:
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
        with closing(Client(self._address, token, PATIENCE)) as client:
            try:
                return client.get_logs(id)
            except Error as error:
                if error.code == "not_found":
                    return b""
                raise

    def unix_name(self, account: str) -> str:
        """The Unix user whose sessions this account starts here."""
        return next((unix for unix, name in self._accounts.items() if name == account), account)
