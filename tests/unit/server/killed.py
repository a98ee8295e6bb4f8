"""Kills a backup or a restore at each of its steps, with SIGKILL, and looks at what it left. For `test_backup`.

`python -m tests.unit.server.killed COMMAND STATE DIRECTORY`, with a backup in DIRECTORY/beaker.db that lacks the
account bob. A step is a call that changes a file or the database, which is not made any more: the
first one of each place in the code, or with SWEEP in the environment every one. Raises AssertionError.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from beaker_sessions.errors import Error
from beaker_sessions.server import backup
from beaker_sessions.server.main import main
from beaker_sessions.server.store import Store, sqlite_url

CALLS = {"rename", "link", "unlink", "mkdir", "rmdir", "fsync", "flock", "write", "backup", "commit", "execute"}
CALLS |= {"executemany", "executescript", "close"}
PACKAGE = "/beaker_sessions/"


def killed(command: list[str], at: int) -> bool:
    """Whether a child that does the command came to step number `at`, at which it kills itself."""
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (command, at, status)
        return os.WIFSIGNALED(status)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    steps: list[object] = []

    def step(frame: FrameType, event: str, function: Any) -> None:
        name = getattr(function, "__name__", "")
        if event != "c_call" or name not in CALLS:
            return
        if name == "close" and not isinstance(getattr(function, "__self__", None), sqlite3.Connection):
            return
        caller: FrameType | None = frame
        while caller and PACKAGE not in caller.f_code.co_filename:
            caller = caller.f_back
        place = (caller.f_code.co_filename, caller.f_lineno, name) if caller else name
        if os.environ.get("SWEEP") or place not in steps:
            steps.append(place)
            if len(steps) == at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(step)
    code = main(command)
    sys.setprofile(None)
    os._exit(code)


def state(place: Path) -> str:
    """Which database a server that starts finds there."""
    backup.check_marker(place / "server.made", place / "server.db")
    store = Store(sqlite_url(place / "server.db"), new=False)
    try:
        with store.read() as rows:
            return "old" if rows.account("bob") else "new"
    finally:
        store.close()


def sweep(command: str, place: Path, directory: Path) -> dict[str, Any]:
    seen: Counter[str] = Counter()
    work, target = directory / "work", directory / "out" / "new.db"
    for at in range(1, 10_000):
        for left in (work, target.parent):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(place, work, ignore=shutil.ignore_patterns("run"))
        target.parent.mkdir()
        file = target if command == "backup" else directory / "beaker.db"
        words = ["--storage-path", str(work), command, str(file)]
        if not killed(words, at):
            return {"steps": at, "states": seen}
        seen[state(work)] += 1
        if target.exists():  # whole, or not there
            backup.restore(work / "server.db", target, work / "server.made", lambda _: None)
            assert state(work) == "old"
        elif at % 3 == 0 or os.environ.get("SWEEP"):
            assert main(words) == 0, at  # the next one is not hindered by what is left
            if command == "restore":
                assert state(work) == "new"
            else:
                assert target.exists()
        else:
            continue
        assert not list(work.glob(".*"))
        asides = [path for path in work.glob("server.db.2*") if path.samefile(work / "server.db")]
        assert not asides, "the database has two names"
    raise AssertionError("it never ends")


if __name__ == "__main__":
    try:
        print(json.dumps(sweep(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
    except Error as error:
        sys.exit(f"{error.message}; {error.hint}")
