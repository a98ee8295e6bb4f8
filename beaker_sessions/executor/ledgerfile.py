"""The ledger's file: opened whatever has become of it, and its room on a full disk.

Owns the schema, how damage is found, and what is saved of a damaged file: the rows that can still be read, in a new
file; the old one is put aside. Must not know what a row means: `Sound` says whether one is whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import logging
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import Error

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
    sum INTEGER,                              -- `checksum` of the row; null in one of an earlier version
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
SUMMED = ("id", "account", "key", "fingerprint", "identity", "state", "job", "revision", "reported")
LIVE = "sessions NOT INDEXED WHERE state != 'finalized'"
SAVED = {"sessions": (*SUMMED, "sum"), "accounts": ("token_hash", "account", "seen"), "facts": ("name", "value")}
ASIDE = "damaged"  # what is put aside is called so, with the time
KEPT = 3  # files put aside that are kept
ROOM = 6 << 20  # bytes that the write-ahead log has for itself. SQLite begins it anew at about 4 MiB
FALLOC_FL_KEEP_SIZE = 1  # fallocate(2)
# What SQLite says of the machine and not of the file. All else that it says of one is damage.
MACHINE = (
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH,
)  # fmt: skip

Sound = Callable[[str, dict[str, Any]], bool]  # whether a row of a table, by column, is whole

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


class Damaged(Exception):
    """What is wrong with the file."""


def checksum(*values: object) -> int:
    """Of the columns SUMMED. SQLite looks after the structure of its file, and not after what is in a row."""
    return zlib.crc32(json.dumps(values).encode())


def open_ledger(path: Path, sound: Sound) -> tuple[sqlite3.Connection, str]:
    """The database, made when missing, and what was damaged, "" for nothing. Raises Error.

    A damaged file is put aside, and what is whole in it is in the new one.
    """
    new = path.with_name(f"{path.name}.new")
    if new.exists() and not path.exists():  # killed in between
        new.rename(path)
    for file in (path, _wal(path), _shm(path)):
        if file.is_symlink() or (file.exists() and not file.is_file()):
            _put_aside(file, "it is no file")
    try:
        return _checked(path, sound), ""
    except Damaged as damage:
        what = str(damage)
    saved = _rebuild(path, new, sound)
    aside = _put_aside(path, what)
    new.rename(path)
    for old in put_aside(path)[:-KEPT]:
        for file in (old, _wal(old)):
            file.unlink(missing_ok=True)
    log.error("what could be read of it is in a new one: %s", saved)
    return _checked(path, sound), f"{what}; put aside as {aside}"


def put_aside(path: Path) -> list[Path]:
    """The damaged ledgers that were put aside, the latest last."""
    found = path.parent.glob(f"{path.name}.{ASIDE}-*")
    return sorted(file for file in found if file.is_file() and not file.name.endswith("-wal"))


def keep_room(path: Path) -> bool:
    """Have blocks of the disk for the write-ahead log, beyond its end, so that it can be written when the disk is full.

    False when there are none now. What a file system cannot do counts as done.
    """
    with contextlib.suppress(OSError):
        fd = os.open(_wal(path), os.O_WRONLY | os.O_CLOEXEC)
        try:
            if _libc.fallocate(fd, FALLOC_FL_KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(ROOM)) != 0:
                return ctypes.get_errno() not in (errno.ENOSPC, errno.EDQUOT)
        finally:
            os.close(fd)
    return True


def _wal(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def _shm(path: Path) -> Path:
    return path.with_name(f"{path.name}-shm")


def _checked(path: Path, sound: Sound) -> sqlite3.Connection:
    """Raises Damaged, or Error for what is the machine's fault."""
    trouble: sqlite3.Error | None = None
    for alone in (False, True):  # without a file for the log's index, for which a full disk has no room
        try:
            db = _connected(path, alone=alone)
        except sqlite3.Error as error:
            if not _of_machine(error):
                raise Damaged(str(error)) from error
            trouble = error
            continue
        try:
            if what := _fault(db, sound):
                raise Damaged(what)
            db.executescript(SCHEMA)
            return db
        except BaseException as error:
            db.close()
            if not isinstance(error, sqlite3.Error):
                raise
            if not _of_machine(error):
                raise Damaged(str(error)) from error
            trouble = error
    full = getattr(trouble, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL
    hint = f"free some space in {path.parent}" if full else "see that the disk is writable"
    code = "storage_full" if full else "unavailable"
    raise Error(code, f"cannot open the ledger {path}: {trouble}", hint) from trouble


def _of_machine(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in MACHINE


def _connected(path: Path, *, alone: bool = False) -> sqlite3.Connection:
    with contextlib.suppress(OSError):  # SQLite says what is wrong
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for file in (path, _wal(path), _shm(path)):
        with contextlib.suppress(FileNotFoundError):
            file.chmod(0o600)  # earlier versions left it to the umask
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
    db.create_function("checksum", len(SUMMED), checksum, deterministic=True)
    db.text_factory = _text
    try:
        if alone:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        db.close()
        raise
    return db


def _text(data: bytes) -> str:
    """Damaged text is no reason to fail where a row is read: its checksum tells."""
    return data.decode(errors="replace")


def _fault(db: sqlite3.Connection, sound: Sound) -> str:
    """What is wrong with it, "" for nothing. Raises sqlite3.Error."""
    here, wanted = _columns(db), _wanted()
    if here and "sum" not in here.get("sessions", {"sum"}):
        db.execute("ALTER TABLE sessions ADD COLUMN sum INTEGER")
        here = _columns(db)
    if here and (lacks := [name for name in wanted if not wanted[name] <= here.get(name, set())]):
        return f"it lacks {', '.join(lacks)}"
    if not here:
        return ""  # it is new
    (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
    if found != "ok":
        return str(found)
    for table in SAVED:
        for row in _select(db, table):
            if not sound(table, row):
                return f"a row of {table} is not what was written"
    claims = {(gpu, session) for gpu, session in db.execute("SELECT gpu, session FROM claims")}
    if claims != {(gpu, id) for id, job in db.execute(f"SELECT id, job FROM {LIVE}") for gpu in held(job)}:
        return "its claims are not those of its sessions"
    return ""


def held(job: str) -> list[str]:
    """The GPUs of a session's JSON that is not final."""
    return list((json.loads(job).get("limits") or {}).get("gpus") or ())


def _columns(db: sqlite3.Connection) -> dict[str, set[str]]:
    names = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {
        name: {column for (column,) in db.execute("SELECT name FROM pragma_table_info(?)", (name,))} for name in names
    }


def _wanted() -> dict[str, set[str]]:
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA)
        return _columns(db)


def _select(db: sqlite3.Connection, table: str, where: str = "") -> Iterator[dict[str, Any]]:
    columns = ("rowid", *SAVED[table])
    for row in db.execute(f"SELECT {', '.join(columns)} FROM {table} NOT INDEXED {where}"):
        yield dict(zip(columns, row, strict=True))


def _rebuild(path: Path, new: Path, sound: Sound) -> str:
    """Write all that is whole in a damaged file into a new one; how much that is. Raises Error storage_full."""
    new.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(new)) as db:
            os.chmod(new, 0o600)
            db.create_function("checksum", len(SUMMED), checksum)
            db.executescript(SCHEMA)
            saved = dict.fromkeys(SAVED, 0)
            for table, row in _salvaged(path):
                values = list(row.values())
                names, marks = ", ".join(row), ", ".join("?" * len(row))
                with contextlib.suppress(sqlite3.IntegrityError, ValueError, TypeError):  # one that cannot be, is not
                    if sound(table, row):
                        db.execute("SAVEPOINT one")
                        try:
                            db.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", values)
                            if table == "sessions" and row["state"] != "finalized":
                                claims = [(gpu, row["id"]) for gpu in held(row["job"])]
                                db.executemany("INSERT INTO claims (gpu, session) VALUES (?, ?)", claims)
                            saved[table] += 1
                        except BaseException:
                            db.execute("ROLLBACK TO one")
                            raise
                        finally:
                            db.execute("RELEASE one")
            db.commit()
    except (sqlite3.Error, OSError) as error:
        what = f"the ledger {path} is damaged, and a new one cannot be written: {error}"
        raise Error("storage_full", what, f"free some space in {path.parent}") from error
    return ", ".join(f"{count} rows of {table}" for table, count in saved.items())


def _salvaged(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row that can still be read."""
    try:
        db = _connected(path, alone=True)
    except sqlite3.Error as error:
        log.error("nothing of the ledger can be read: %s", error)
        return
    with contextlib.closing(db):
        for table in SAVED:
            rows: dict[int, dict[str, Any]] = {}
            for order in ("ASC", "DESC"):
                with contextlib.suppress(sqlite3.Error):
                    for row in _select(db, table, f"ORDER BY rowid {order}"):
                        if order == "DESC" and row["rowid"] in rows:
                            break
                        rows[row["rowid"]] = row
            numbers = sorted(rows)
            for low, high in itertools.pairwise(numbers):  # what lies between two damaged places
                for number in range(low + 1, min(high, low + 10_000)):
                    with contextlib.suppress(sqlite3.Error):
                        rows |= {row["rowid"]: row for row in _select(db, table, f"WHERE rowid = {number}")}
            for number in sorted(rows):
                yield table, rows[number]


def _put_aside(path: Path, why: str) -> Path:
    """Out of the way, with the log that belongs to it."""
    aside = path.with_name(f"{path.name}.{ASIDE}-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")
    log.error("the ledger %s is damaged (%s); put aside as %s", path, why, aside)
    path.rename(aside)
    for file, name in ((_wal(path), _wal(aside)), (_shm(path), None)):
        with contextlib.suppress(OSError):
            file.rename(name) if name else file.unlink()
    return aside
