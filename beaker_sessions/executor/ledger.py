"""The executor's ledger: sessions of this node, their claims, what was not reported yet, and an audit of every change.

Owns the SQLite file; nobody else opens it. Every method is one transaction, durable when it returns. Two constraints
hold whatever the code above does: a GPU is the primary key of its claim, and a session's state moves only along
`model.MOVES`.

Must not decide anything: claims are computed in `claims`, written here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from .. import wire
from ..errors import Error
from ..model import LIVE, MOVES, Identity, Session, State

log = logging.getLogger(__name__)

SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,    -- order of arrival, which is the queue's order
    id TEXT NOT NULL UNIQUE,
    account TEXT NOT NULL,
    key TEXT,                                 -- the client's idempotency key
    fingerprint TEXT,                         -- of the request that the key was used for
    identity TEXT NOT NULL,                   -- JSON of the Unix user it runs as
    state TEXT NOT NULL,
    job TEXT NOT NULL,                        -- the session as REST JSON
    revision INTEGER NOT NULL,
    reported INTEGER NOT NULL DEFAULT -1,     -- the revision that the server has
    UNIQUE (account, key)
);
CREATE INDEX IF NOT EXISTS sessions_live ON sessions (seq) WHERE state != 'finalized';
CREATE INDEX IF NOT EXISTS sessions_unreported ON sessions (seq) WHERE reported < revision;
CREATE TABLE IF NOT EXISTS claims (
    gpu TEXT PRIMARY KEY,                     -- the constraint behind "no GPU is in two live sessions"
    session TEXT NOT NULL REFERENCES sessions (id)
);
CREATE TABLE IF NOT EXISTS audit (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    at TEXT NOT NULL,
    actor TEXT NOT NULL,
    action TEXT NOT NULL,
    subject TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS accounts (         -- accounts that the server vouched for, for when it is away
    token_hash TEXT PRIMARY KEY,
    account TEXT NOT NULL,
    seen TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
KEEP_FINAL = 1000  # finished sessions remembered here; the server remembers all


class Ledger:
    """Open the ledger at `path`, making it when missing.

    A file that SQLite calls corrupt is put aside under another name, and a new one is begun: the sessions in it are
    found again by their containers' labels. `lost` then says so.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self.lost = False
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            self._db = self._open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # locked, unreadable, disk full: not a corrupt file
                raise Error(
                    "unavailable", f"cannot open the ledger {path}: {error}", "see that the disk is writable"
                ) from error
            aside = path.with_name(f"{path.name}.corrupt-{datetime.now(UTC):%Y%m%dT%H%M%S}")
            log.error("the ledger %s is corrupt (%s); put aside as %s", path, error, aside)
            path.rename(aside)
            for leftover in (f"{path}-wal", f"{path}-shm"):
                Path(leftover).unlink(missing_ok=True)
            self._db = self._open(path)
            self.lost = True

    @staticmethod
    def _open(path: Path) -> sqlite3.Connection:
        with contextlib.suppress(OSError):  # SQLite says what is wrong
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
            with contextlib.suppress(FileNotFoundError):
                file.chmod(0o600)  # earlier versions left it to the umask
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA foreign_keys = ON")
            if db.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("quick_check failed")
            db.executescript(SCHEMA)
        except sqlite3.Error:
            db.close()
            raise
        return db

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is written inside is committed together, or not at all. Nests into one.

        Raises Error storage_full or unavailable when the disk refuses, conflict when a constraint does.
        """
        with self._lock:
            if self._db.in_transaction:
                yield self._db
                return
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                self._rollback()
                raise _translated(error) from error
            except BaseException:
                self._rollback()
                raise

    def _rollback(self) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add(self, session: Session, identity: Identity, key: str | None, fingerprint: str) -> None:
        """A new session, in whatever state it was found. Its key must be new for the account."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO sessions (id, account, key, fingerprint, identity, state, job, revision)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    session.id, session.account, key, fingerprint, _identity_json(identity),
                    session.state, json.dumps(wire.job(session)), session.revision,
                ),
            )  # fmt: skip
            self._hold(db, session)
            self._note(db, session.account, f"session.{session.state}", session.id, "")

    def move(self, old: Session, new: Session, actor: str = "executor", detail: str = "") -> Session:
        """Write `new` in place of `old`, its revision one higher; claims are taken and freed with the state.

        Raises ValueError for a move that `MOVES` forbids, Error conflict when a GPU is already claimed.
        """
        if new.state != old.state and new.state not in MOVES[old.state]:
            raise ValueError(f"session {old.id} cannot go from {old.state} to {new.state}")
        if old.state == State.FINALIZED:
            raise ValueError(f"session {old.id} is final")
        new = replace(new, revision=old.revision + 1)
        with self.transaction() as db:
            changed = db.execute(
                "UPDATE sessions SET state = ?, job = ?, revision = ? WHERE id = ? AND revision = ?",
                (new.state, json.dumps(wire.job(new)), new.revision, new.id, old.revision),
            ).rowcount
            if changed != 1:
                raise ValueError(f"session {old.id} has changed since revision {old.revision}")
            if old.state not in LIVE:
                self._hold(db, new)
            if new.state == State.FINALIZED:
                db.execute("DELETE FROM claims WHERE session = ?", (new.id,))
                db.execute(
                    "DELETE FROM sessions WHERE state = 'finalized' AND reported >= revision AND seq <= "
                    "(SELECT seq FROM sessions WHERE state = 'finalized' ORDER BY seq DESC LIMIT 1 OFFSET ?)",
                    (KEEP_FINAL,),
                )
            self._note(
                db, actor, f"session.{new.state}" if new.state != old.state else "session.changed", new.id, detail
            )
        return new

    @staticmethod
    def _hold(db: sqlite3.Connection, session: Session) -> None:
        if session.state in LIVE and session.claim:
            db.executemany(
                "INSERT INTO claims (gpu, session) VALUES (?, ?)", [(g, session.id) for g in session.claim.gpus]
            )

    @staticmethod
    def _note(db: sqlite3.Connection, actor: str, action: str, subject: str, detail: str) -> None:
        db.execute(
            "INSERT INTO audit (at, actor, action, subject, detail) VALUES (?, ?, ?, ?, ?)",
            (datetime.now(UTC).isoformat(), actor, action, subject, detail),
        )

    def by_key(self, account: str, key: str) -> tuple[Session, str] | None:
        """The session that this account made with this idempotency key, and its request's fingerprint."""
        rows = self._rows("SELECT job, fingerprint FROM sessions WHERE account = ? AND key = ?", account, key)
        return (wire.session(json.loads(rows[0][0])), rows[0][1]) if rows else None

    def get(self, id: str) -> tuple[Session, Identity] | None:
        rows = self._rows("SELECT job, identity FROM sessions WHERE id = ?", id)
        return (wire.session(json.loads(rows[0][0])), _identity(rows[0][1])) if rows else None

    def live(self) -> list[tuple[Session, Identity]]:
        """All sessions that are not final, in order of arrival."""
        rows = self._rows("SELECT job, identity FROM sessions WHERE state != 'finalized' ORDER BY seq")
        return [(wire.session(json.loads(job)), _identity(identity)) for job, identity in rows]

    def final(self, limit: int) -> list[Session]:
        """The latest finished sessions, newest first."""
        rows = self._rows("SELECT job FROM sessions WHERE state = 'finalized' ORDER BY seq DESC LIMIT ?", limit)
        return [wire.session(json.loads(job)) for (job,) in rows]

    def unreported(self, limit: int = 100) -> list[Session]:
        """Sessions with changes that the server does not have, oldest first."""
        rows = self._rows("SELECT job FROM sessions WHERE reported < revision ORDER BY seq LIMIT ?", limit)
        return [wire.session(json.loads(job)) for (job,) in rows]

    def reported(self, id: str, revision: int) -> None:
        with self.transaction() as db:
            db.execute("UPDATE sessions SET reported = ? WHERE id = ? AND reported < ?", (revision, id, revision))

    def report_anew(self, epoch: str) -> None:
        """Every session is to be reported to the server, whose database is this one from now on."""
        with self.transaction() as db:
            db.execute("UPDATE sessions SET reported = -1")
            db.executemany(
                "INSERT OR REPLACE INTO facts VALUES (?, ?)", [("epoch", epoch), ("met", datetime.now(UTC).isoformat())]
            )

    def had(self, id: str) -> bool:
        """Whether there ever was such a session here, also one that is forgotten by now."""
        return bool(self._rows("SELECT 1 FROM audit WHERE subject = ? LIMIT 1", id))

    def vouch(self, token_hash: str, account: dict) -> None:
        """Remember that the server knew this token just now; forgets those not seen for long."""
        now = datetime.now(UTC).isoformat()
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO accounts VALUES (?, ?, ?)", (token_hash, json.dumps(account), now))

    def vouched(self, token_hash: str) -> tuple[dict, datetime] | None:
        rows = self._rows("SELECT account, seen FROM accounts WHERE token_hash = ?", token_hash)
        return (json.loads(rows[0][0]), datetime.fromisoformat(rows[0][1])) if rows else None

    def vouched_hashes(self, since: datetime, limit: int, after: str) -> list[str]:
        """Of the tokens that the server knew since then, those that come after that hash, then from the first on."""
        query = "SELECT token_hash FROM accounts WHERE seen > ? ORDER BY token_hash <= ?, token_hash LIMIT ?"
        return [hash for (hash,) in self._rows(query, since.isoformat(), after, limit)]

    def refuse(self, token_hash: str) -> None:
        """Forget a token that the server refused."""
        with self.transaction() as db:
            db.execute("DELETE FROM accounts WHERE token_hash = ?", (token_hash,))

    def fact(self, name: str, value: str | None = None) -> str | None:
        """A fact about this node that outlives the executor, such as its id; written when `value` is given."""
        if value is not None:
            with self.transaction() as db:
                db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))
            return value
        rows = self._rows("SELECT value FROM facts WHERE name = ?", name)
        return rows[0][0] if rows else None

    def _rows(self, sql: str, *values: object) -> list[tuple]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise _translated(error) from error


def held(sessions: Iterable[Session]) -> set[str]:
    """The GPUs that these sessions hold."""
    return {gpu for s in sessions if s.state in LIVE and s.claim for gpu in s.claim.gpus}


def _translated(error: sqlite3.Error) -> Error:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return Error("storage_full", "the disk of this node's ledger is full", "free some space under its storagePath")
    if code == sqlite3.SQLITE_CONSTRAINT:
        return Error("conflict", f"the ledger refuses this change: {error}")
    return Error("unavailable", f"the ledger cannot be used: {error}", "beaker executor doctor")


def _identity_json(identity: Identity) -> str:
    groups = {str(gid): name for gid, name in identity.groups.items()}
    return json.dumps({**identity.__dict__, "groups": groups})


def _identity(text: str) -> Identity:
    data = json.loads(text)
    return Identity(**{**data, "groups": {int(gid): name for gid, name in data["groups"].items()}})
