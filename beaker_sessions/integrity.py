"""Whether a SQLite database is whole. Owns what is asked of SQLite, and how its answer is put into words.

Must not know what is in the database, nor mend it.
"""

from __future__ import annotations

import sqlite3

BROKEN = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR)  # primary codes of a damaged file

MEND = "stop the server, and restore a backup: beaker-server restore FILE"


def is_damage(error: BaseException | None) -> bool:
    """Whether SQLite refused because its file is damaged, and not because it is locked or the disk is full."""
    code = getattr(error, "sqlite_errorcode", None)
    if code is None:  # Python's own: of these there is one of this kind, for text that is no UTF-8
        return isinstance(error, sqlite3.OperationalError)
    return code & 0xFF in BROKEN


def damage(connection: sqlite3.Connection, *, quick: bool = False) -> str:
    """What is damaged, in one line; "" when nothing is. Reads the whole database.

    quick: without comparing indexes with their tables. Raises sqlite3.Error when it cannot be looked at.
    """
    # https://www.sqlite.org/pragma.html#pragma_integrity_check
    try:
        found = [str(row[0]) for row in connection.execute(f"PRAGMA {'quick' if quick else 'integrity'}_check(3)")]
        if found == ["ok"]:
            lost = None if quick else connection.execute("PRAGMA foreign_key_check").fetchone()
            found = [f"a row of {lost[0]} refers to one that is gone"] if lost else []
    except sqlite3.DatabaseError as error:
        if not is_damage(error):
            raise
        found = [str(error)]
    return " ".join("; ".join(found).replace("*** in database main ***", "").split())
