"""The executor's ledger: sessions of this node, their claims, what was not reported yet, and an audit of every change.

Owns the SQLite file, which `ledgerfile` opens and nobody else. Every method is one transaction, durable when it
returns. Two constraints hold whatever the code above does: a GPU is the primary key of its claim, and a session's state
moves only along `model.MOVES`.

Must not decide anything: claims are computed in `claims`, written here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import wire
from ..errors import Error
from ..model import LIVE, MOVES, Identity, Session, State
from . import ledgerfile

log = logging.getLogger(__name__)

KEEP_FINAL = 1000  # finished sessions remembered here; the server remembers all


class Ledger:
    """Open the ledger at `path`, making it when missing.

    A damaged one is put aside, and what is whole in it goes on in a new one: `damage` says so. The sessions that are
    lost are found again by their sandboxes' labels. on_damage: called when damage is found later, once; opening the
    ledger again mends it.
    """

    def __init__(self, path: Path) -> None:
        self._lock, self._path = threading.RLock(), path
        self.on_damage: Callable[[str], None] = lambda _what: None
        self.is_damaged = False  # now, since it was opened
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._db, self.damage = ledgerfile.open_ledger(path, _sound)
        self.keep_room()

    def keep_room(self) -> bool:
        """Have room for what changes while the disk is full. False when there is none now."""
        return ledgerfile.keep_room(self._path)

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
                raise self._translated(error) from error
            except BaseException:
                self._rollback()
                raise

    def _rollback(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # what rolls back by itself, such as a full disk
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _translated(self, error: sqlite3.Error) -> Error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            what = f"the disk of this node's ledger, {self._path}, is full"
            return Error("storage_full", what, f"free some space in {self._path.parent}")
        if code == sqlite3.SQLITE_CONSTRAINT:
            return Error("conflict", f"the ledger refuses this change: {error}")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            self._damaged(f"the ledger {self._path} is damaged: {error}")
        return Error("unavailable", f"the ledger cannot be used: {error}", "beaker executor doctor")

    def _damaged(self, what: str) -> None:
        if not self.is_damaged:
            self.damage, self.is_damaged = what, True
            log.critical("%s", what)
            self.on_damage(what)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add(self, session: Session, identity: Identity, key: str | None, fingerprint: str) -> None:
        """A new session, in whatever state it was found. Its key must be new for the account."""
        with self.transaction() as db:
            db.execute(
                "INSERT INTO sessions (id, account, key, fingerprint, identity, state, job, revision, reported, sum)"
                " VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, -1, checksum(?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, -1))",
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
                "UPDATE sessions SET state = ?1, job = ?2, revision = ?3,"
                " sum = checksum(id, account, key, fingerprint, identity, ?1, ?2, ?3, reported)"
                " WHERE id = ?4 AND revision = ?5",
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

    def raise_revision(self, session: Session, revision: int) -> Session:
        """The same session, also a final one, with a revision that is to be reported."""
        new = replace(session, revision=revision)
        with self.transaction() as db:
            changed = db.execute(
                "UPDATE sessions SET state = ?1, job = ?2, revision = ?3,"
                " sum = checksum(id, account, key, fingerprint, identity, ?1, ?2, ?3, reported)"
                " WHERE id = ?4 AND revision = ?5",
                (new.state, json.dumps(wire.job(new)), new.revision, new.id, session.revision),
            ).rowcount
        if changed != 1:
            raise ValueError(f"session {session.id} has changed since revision {session.revision}")
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
            db.execute(
                "UPDATE sessions SET reported = ?1,"
                " sum = checksum(id, account, key, fingerprint, identity, state, job, revision, ?1)"
                " WHERE id = ?2 AND reported < ?1",
                (revision, id),
            )

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
        return _account(*rows[0]) if rows else None

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

    def note(self, name: str, value: str) -> None:
        """Keep a fact that can do without it: silent where the disk is full."""
        try:
            if self.fact(name) != value:
                self.fact(name, value)
        except Error as error:
            if error.code != "storage_full":
                raise
            log.error("the fact %s is not written down: %s", name, error)

    def _rows(self, sql: str, *values: object) -> list[tuple]:
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise self._translated(error) from error


def held(sessions: Iterable[Session]) -> set[str]:
    """The GPUs that these sessions hold."""
    return {gpu for s in sessions if s.state in LIVE and s.claim for gpu in s.claim.gpus}


def _identity_json(identity: Identity) -> str:
    groups = {str(gid): name for gid, name in identity.groups.items()}
    return json.dumps({**identity.__dict__, "groups": groups})


def _identity(text: str) -> Identity:
    data = json.loads(text)
    return Identity(**{**data, "groups": {int(gid): name for gid, name in data["groups"].items()}})


def _account(account: str, seen: str) -> tuple[dict, datetime]:
    return dict(json.loads(account)), datetime.fromisoformat(seen)


def _sound(table: str, row: dict[str, Any]) -> bool:
    """Whether a row is what was written, as far as can be known."""
    try:
        if table == "sessions":
            if row["sum"] not in (None, ledgerfile.checksum(*(row[name] for name in ledgerfile.SUMMED))):
                return False
            if row["sum"] is not None and row["state"] == State.FINALIZED:
                return True  # there are many
            session, _ = wire.session(json.loads(row["job"])), _identity(row["identity"])
            return (session.id, session.state) == (row["id"], row["state"])
        if table == "accounts":
            _account(row["account"], row["seen"])
        return all(isinstance(value, str) for name, value in row.items() if name != "rowid")
    except Exception:  # whatever reading it raises
        return False
