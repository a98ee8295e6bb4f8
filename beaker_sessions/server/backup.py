"""`beaker-server backup` and `restore`: a copy of the SQLite database while the server runs, and the way back.

Owns the files: the lock that a server holds, the copy, what is kept aside, and the marker that says there was a
database. Must not know rules. What a restored database lacks, nodes report again, since its epoch is another: see
`executor.report`. A backup holds no key; one whose secrets the present key does not open is refused.

Killed at any moment, either leaves the database as it was or as it shall be, never half of each. What is not
finished is in a directory of its own beside the file, which the next one for that file removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from .. import ids, trust
from ..errors import Error
from ..integrity import MEND, damage, is_damage
from .store import Store, sqlite_url

JOURNALS = ("-wal", "-shm", "-journal")  # SQLite's files beside a database, https://www.sqlite.org/tempfiles.html
log = logging.getLogger(__name__)
WHERE = "run it as whose directory that is, or name a file in one of root's, such as /var/backups/beaker.db"


def check_marker(marker: Path, database: Path) -> None:
    """Raises Error unavailable where there was a database and now is none: a new one would know nobody."""
    if marker.exists() and (not database.exists() or database.stat().st_size == 0):
        hint = f"{MEND}; to begin without any accounts and sessions instead, remove {marker}"
        raise Error("unavailable", f"the database {database} is gone, and there was one", hint)


def mark(marker: Path) -> None:
    """Note that there is a database from now on."""
    try:
        os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        _settle(marker.parent)
    except FileExistsError:
        pass
    except OSError as error:  # keys may be where nothing else can be written
        log.warning("cannot make %s: %s; a database that is lost will be begun anew", marker, error.strerror)


@contextlib.contextmanager
def in_use(database: Path, *, alone: bool = False) -> Iterator[None]:
    """Hold the database, together with others or alone, until the end of the block. Raises Error conflict."""
    with _explained(database):
        lock = os.open(f"{database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what, hint = "a restore changes", "wait for its end"
            if alone:
                what, hint = "a server or a backup uses", "stop the server: systemctl stop beaker-server, or make down"
            raise Error("conflict", f"{what} the database {database}", hint) from error
        yield
    finally:
        os.close(lock)


def backup(database: Path, target: Path) -> None:
    """Copy the database, as of one moment, to a new file of mode 0600, checked before and after.

    Raises Error: conflict when there is such a file, not_found without a database, unavailable for a damaged one,
    forbidden where others can change the directory, storage_full.
    """
    target = target.absolute()
    if os.path.lexists(target):
        raise Error("conflict", f"{target} is there already", "name a new file")
    _need(database)
    with in_use(database), _workplace(target) as place, _explained(target):
        copy = place / "copy.db"
        _create(copy)
        with _opened(database) as source, _opened(copy, write=True) as new:
            _verify(source, database, MEND)
            # All pages in one step: what others write meanwhile would begin a copy in several steps anew.
            source.backup(new, pages=-1)
            _alone_in_file(new)
            _verify(new, target, "try again, on another disk")
        _settle(copy)
        try:
            os.link(copy, target)  # which, unlike a rename, never replaces a file that somebody made meanwhile
        except FileExistsError as error:
            raise Error("conflict", f"{target} is there already", "name a new file") from error
        _settle(target.parent)


def restore(database: Path, source: Path, marker: Path, check: Callable[[Store], object]) -> Path | None:
    """Put a backup in the place of the database; returns where that one is kept, None when there was none.

    Tokens that the present database knows as revoked are revoked in the new one too, and browsers sign in again.
    check: raises Error for a database that this server's key does not open. Raises Error: conflict while a server
    runs, not_found, invalid for a file that is no backup, unavailable for a damaged one, forbidden for one that others
    can change, storage_full.
    """
    source = source.absolute()
    _need(source)
    with in_use(database, alone=True), _workplace(database) as place, _explained(database):
        new = place / "new.db"
        _copy(source, new, database)
        with _opened(new, write=True) as copy:
            _verify(copy, source)
            _alone_in_file(copy)
            if not copy.execute("SELECT 1 FROM sqlite_schema WHERE name = 'alembic_version'").fetchone():
                raise Error("invalid", f"{source} is no backup of a server", "name a file of beaker-server backup")
        store = Store(sqlite_url(new), new=False)  # brings an older one up to date, and refuses a newer one
        try:
            check(store)
            with store.write() as rows:
                rows.set_fact("epoch", ids.ulid())
                rows.forget_signins()  # those that were signed out since would be signed in again
        finally:
            store.close()
        with _opened(new, write=True) as copy:
            revoked = [(when, hash) for hash, when in _revoked(database)]
            copy.executemany("UPDATE tokens SET revoked = ? WHERE hash = ? AND revoked IS NULL", revoked)
            copy.commit()
            _alone_in_file(copy)
            _verify(copy, source)
        _settle(new)
        return _replace(database, new, marker)


def _replace(database: Path, new: Path, marker: Path) -> Path | None:
    """One rename, before which the old database is a single file that has a second name."""
    aside = database.with_name(f"{database.name}.{datetime.now(UTC):%Y%m%dT%H%M%S.%f}")
    mark(marker)  # from here on no server takes a missing database for a first start
    there = database.exists()
    if there:
        for left in database.parent.glob(f"{database.name}.2*"):
            if left.samefile(database):  # a second name that a killed one gave it
                left.unlink()
        if _is_one_file(database):
            os.link(database, aside)
        else:
            os.rename(database, aside)  # damaged, and of no use without its journals: no server starts until the end
    for journal in JOURNALS:  # part of the old database, and poison to another
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{database}{journal}", f"{aside}{journal}")
    _settle(database.parent)
    os.rename(new, database)
    _settle(database.parent)
    return aside if there else None


def _is_one_file(database: Path) -> bool:
    """Have all of the database in its file; False when it is too damaged. Raises Error when somebody uses it."""
    try:
        with _opened(database, write=True) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            _alone_in_file(connection)
            return True
    except sqlite3.Error as error:
        if is_damage(error):
            return False
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
            raise Error("conflict", f"a program uses the database {database}", "stop it first") from error
        raise


def _revoked(database: Path) -> list[tuple[str, str]]:
    """Hash and moment of each token that is revoked in the database, as far as it can be read."""
    found: list[tuple[str, str]] = []
    with contextlib.suppress(sqlite3.Error), _opened(database) as present:
        for row in present.execute("SELECT hash, revoked FROM tokens NOT INDEXED WHERE revoked IS NOT NULL"):
            found.append(row)  # one by one: what comes before the damage counts
    return found


def _verify(connection: sqlite3.Connection, path: Path, hint: str = "use another backup") -> None:
    if found := damage(connection):
        raise Error("unavailable", f"the database {path} is damaged: {found}", hint)


def _alone_in_file(connection: sqlite3.Connection) -> None:
    """From now on nothing of the database is in a journal beside it."""
    connection.execute("PRAGMA journal_mode=DELETE")


def _copy(source: Path, new: Path, database: Path) -> None:
    """Its bytes, so that nothing beside it is read, and what is checked is what is used."""
    if found := next(trust.of([], [str(source)]), ""):
        hint = "if you trust it all the same, copy it to a directory of root's first"
        raise Error("forbidden", f"others can change the backup {source}: {found}", hint)
    if not source.is_file() or (database.exists() and source.samefile(database)):
        raise Error("invalid", f"{source} is no backup", "name a file of beaker-server backup")
    with open(source, "rb") as file:
        if any(os.path.exists(f"{source}{end}") and os.stat(f"{source}{end}").st_size for end in JOURNALS[::2]):
            hint = f"make one of it: beaker-server --database sqlite:///{source} backup FILE"
            raise Error("invalid", f"{source} is no backup, as a journal is beside it", hint)
        _create(new)
        with open(new, "wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)


def _need(file: Path) -> None:
    if not file.exists():
        raise Error("not_found", f"there is no database {file}", "name the file of one")


def _create(path: Path) -> None:
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


@contextlib.contextmanager
def _opened(path: Path, *, write: bool = False) -> Iterator[sqlite3.Connection]:
    uri = f"{path.absolute().as_uri()}?mode={'rw' if write else 'ro'}"
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10)) as connection:
        yield connection


@contextlib.contextmanager
def _workplace(beside: Path) -> Iterator[Path]:
    """A new directory for root alone beside a file, so on its file system. What a killed one left in it goes.

    SQLite opens its files by name, hence nobody else may be able to put others there.
    """
    place = beside.with_name(f".{beside.name}.partial")
    with _explained(beside):
        made = not place.is_dir()
        with contextlib.suppress(FileExistsError):
            place.mkdir(0o700)
        held = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(held)
        others = "it is not ours" if found.st_uid != os.geteuid() or found.st_mode & 0o077 else ""
        if others := others or next(trust.of([], [str(place)]), ""):
            if made:
                place.rmdir()
            raise Error("forbidden", f"others can change {place.parent}: {others}", WHERE)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Error("conflict", f"{beside} is being written already", "wait for its end") from error
        if not os.path.exists(place) or not os.path.samestat(os.stat(place), found):
            raise Error("conflict", f"{beside} was just written by somebody else", "look at it, then try again")
        with _explained(beside):
            for left in place.iterdir():
                left.unlink()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(held)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Raises Error for whatever file system and SQLite refuse."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Error("storage_full", f"the disk of {path} is full", "free some space") from error
        name = error.filename or path
        raise Error("unavailable", f"cannot use {name}: {error.strerror}", "mend that, or name another file") from error
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_FULL:
            raise Error("storage_full", f"the disk of {path} is full", "free some space") from error
        if is_damage(error):
            raise Error("unavailable", f"a database is damaged: {error}", MEND) from error
        raise Error("unavailable", f"{path}: {error}", "try again, as root, while nobody else uses it") from error


def _settle(path: Path) -> None:
    """Have the disk hold a file, or the names in a directory, before anything that relies on it is done."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
