"""Who is calling, and whether the token they show is theirs. The rule of the door; knows no sessions.

Two witnesses must agree: the kernel says which Unix user is at the other end of the socket, the server says whose token
it is. So a stolen token does not open another person's home, and a Unix login alone spends nobody's budget.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta

from .. import ids
from ..client import Client
from ..errors import Error
from ..grammar import parse_duration
from ..settings import ExecutorSettings
from ..transport import Endpoint
from . import admission
from .ledger import Ledger

log = logging.getLogger(__name__)

PATIENCE = 3.0  # seconds that the server is given to answer
AWAY = 10.0  # seconds that a server which did not answer is left alone, so that nobody here waits for it each time
FRESH = 4.0  # seconds that the server's word on a token is good for: a revoked one is refused within 5 s
# How long after the server last knew a token it works while the server is away: to attach, exec, stop and list. What
# starts sessions is trusted for less, by the settings.
LATELY = timedelta(days=7)
NOTED = timedelta(minutes=1)  # between two notes in the ledger that the server knew a token
EVICTED = 60.0  # seconds in which an answer that was under way when a token ended is not believed; none takes so long
VOUCHED = 1000  # tokens that the server is asked about at each heartbeat


class Access:
    """Turns tokens into accounts by asking the server, with a short memory, and a long one for when it is away.

    creates: how long after the server last knew a token it may start sessions while the server is away.
    """

    def __init__(
        self, ledger: Ledger, server: Endpoint, accounts: Mapping[str, str], creates: timedelta = timedelta(minutes=15)
    ) -> None:
        self._ledger, self._server, self._accounts, self.creates = ledger, server, accounts, creates
        self._known: dict[str, tuple[float, dict]] = {}  # by hash; when it was asked, of CLOCK_BOOTTIME
        self._noted: dict[str, float] = {}  # by hash: when the ledger was told last
        self._evicted: dict[str, float] = {}  # by hash: when a token was found to have ended
        self._away_until = 0.0
        self._asked_about = ""  # the last of the hashes that the server was asked about
        self._lock = threading.Lock()  # of what is in memory, which the event loop asks: never while the disk is
        self._writing = threading.Lock()  # of the ledger's part of it: a refusal is written after what it refuses

    def is_fresh(self, token: str) -> bool:
        """Whether `account` answers at once, by what the server said just now."""
        with self._lock:
            checked, _ = self._known.get(ids.hash_token(token), (-FRESH, {}))
        return _now() - checked < FRESH

    def account(self, token: str, within: timedelta = LATELY) -> dict:
        """The account (REST JSON, with the token's `scope`) of a token.

        within: how long ago the server may have known it, when it is away now. Raises Error unauthorized for a wrong,
        revoked or expired one, unavailable when nobody can say.
        """
        if not ids.looks_like_token(token):
            raise Error(
                "unauthorized",
                "this is not a valid token" if token else "no token was given",
                "see beaker account token",
            )
        digest = ids.hash_token(token)
        with self._lock:
            checked, account = self._known.get(digest, (-FRESH, {}))
        if account and _now() - checked < FRESH:
            return account
        remembered = self._remembered(digest, within)
        if remembered and _now() < self._away_until:
            return remembered
        asked = _now()
        try:
            with closing(Client(self._server, token, PATIENCE)) as client:
                account = client.whoami()
        except Error as error:
            if error.code in ("unauthorized", "forbidden"):
                if not self._remembered(digest, LATELY) or self._is_ours():
                    self.revoke([digest])
                    raise
                error = Error("unavailable", "the server has another database than before", "it is to be restored")
            if error.code != "unavailable":
                raise
            self._away_until = _now() + AWAY
            # Again: it may have been revoked while the server did not answer.
            if not (remembered := self._remembered(digest, within)):
                raise self._unknown(digest, error) from error
            return remembered
        if not self._vouch(digest, account, asked):
            return self.account(token, within)
        return account

    def _is_ours(self) -> bool:
        """Whether the server has the database that this executor reports to: what another one does not know has not
        ended.
        """
        known = self._ledger.fact("epoch")
        try:
            with closing(Client(self._server, "", PATIENCE)) as client:
                return not known or client.epoch() in ("", known)
        except Error:
            return True

    def vouched(self) -> list[str]:
        """Hashes of tokens that would be let in while the server is away; VOUCHED at a time, at each call the next."""
        hashes = self._ledger.vouched_hashes(datetime.now(UTC) - LATELY, VOUCHED, self._asked_about)
        self._asked_about = hashes[-1] if hashes else ""
        return hashes

    def revoke(self, hashes: Iterable[str]) -> None:
        """Forget tokens that have ended, by their hashes. No answer that was under way brings them back."""
        for digest in hashes:
            with self._lock:
                self._known.pop(digest, None)
                self._noted.pop(digest, None)
                self._evicted = {old: at for old, at in self._evicted.items() if _now() - at < EVICTED}
                self._evicted[digest] = _now()
            with self._writing, _on_full_disk():  # the next heartbeat asks about it again
                self._ledger.refuse(digest)

    def _vouch(self, digest: str, account: dict, asked: float) -> bool:
        """Remember what the server answered to a question of that time; False when the token has ended since."""
        with self._lock:
            if self._has_ended(digest, asked):
                return False
            self._known[digest] = (asked, account)
            if asked - self._noted.get(digest, float("-inf")) < NOTED.total_seconds():
                return True
        with self._writing:
            with self._lock:
                if self._has_ended(digest, asked):
                    return False
                self._noted[digest] = asked
            with _on_full_disk():
                self._ledger.vouch(digest, account)
        with self._lock:
            return not self._has_ended(digest, asked)

    def _has_ended(self, digest: str, asked: float) -> bool:
        return self._evicted.get(digest, -1.0) >= asked

    def _remembered(self, digest: str, within: timedelta) -> dict | None:
        """The account of a token that the server knew so lately. Of this executor's own questions the age is exact."""
        with self._lock:
            checked, account = self._known.get(digest, (0.0, {}))
        if account:
            return account if _now() - checked <= within.total_seconds() else None
        known = self._ledger.vouched(digest)
        return known[0] if known and datetime.now(UTC) - known[1] <= within else None

    def _unknown(self, digest: str, error: Error) -> Error:
        """Why a token that the server knew too long ago, or never, does not do now."""
        if not self._remembered(digest, LATELY):
            return error
        minutes = f"{self.creates.total_seconds() / 60:g} minutes"
        return Error(
            "unavailable",
            f"{error.message}, and it has not known your token for {minutes}, so no new session starts",
            "what runs goes on: attach, exec and stop work; the administrator is to start the server",
        )

    def check(self, token: str, unix_name: str, *, creates: bool = False) -> dict:
        """The token's account, which must be the one of this Unix user (the same name, or as the settings map it).

        creates: it is to start a session, for which the server must have known it lately.
        """
        account = self.account(token, self.creates if creates else LATELY)
        expected = admission.account_of(unix_name, self._accounts)
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


@contextmanager
def _on_full_disk() -> Iterator[None]:
    """What need not be written down, lest nobody could stop and clean."""
    try:
        yield
    except Error as error:
        if error.code != "storage_full":
            raise
        log.error("%s", error.message)


def trusted(settings: ExecutorSettings) -> timedelta:
    """`Access.creates` of the settings. Raises Error invalid."""
    try:
        return timedelta(seconds=parse_duration(settings.trust_without_server))
    except ValueError as error:
        raise Error("invalid", f"trustWithoutServer: {error}", "correct the settings") from error


def _now() -> float:
    """Seconds that no change of the wall clock moves, and that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
