"""Samples a stack while a test runs: ledger, the server's database, the driver's sandboxes and their cgroups.

Owns how they are read: with the eyes of the machine's root, never through the programs under test, and so cheaply that
nobody notices. What must hold of the samples is said in `invariants`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from beaker_sessions import wire
from beaker_sessions.executor import inventory
from beaker_sessions.model import Resources, Session
from beaker_sessions.sandbox.oci import cgroups, userns
from beaker_sessions.settings import ExecutorSettings, load

from .invariants import Box, Sample, violations
from .stack import Stack


class Recorder:
    """Use it with `with`, then ask for `broken`. pause: seconds between two samples."""

    def __init__(self, stack: Stack, pause: float = 0.1) -> None:
        self.stack, self.pause = stack, pause
        self.history: list[Sample] = []
        self.excused: set[str] = set()
        self.capacity: Resources = inventory.read(load(ExecutorSettings, str(stack.config))).capacity
        self._cgroups = cgroups.detect()
        self._ledgers: dict[
            int, int
        ] = {}  # the inodes of those that were seen, kept open so that no other gets its number
        self._parsed: dict[str, Session] = {}
        self._served = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self.failure: BaseException | None = None

    def __enter__(self) -> Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        while self._ledgers:
            os.close(self._ledgers.popitem()[1])

    def excuse(self, invariant: str) -> None:
        """This test breaks one on purpose."""
        self.excused.add(invariant)

    def broken(self) -> list[str]:
        if self.failure:
            raise self.failure
        found = [*violations(self.history, self.capacity), *foreign(self.stack)]
        return [what for what in found if what.partition(":")[0] not in self.excused]

    def _run(self) -> None:
        last = time.monotonic()
        try:
            while not self._stopped.wait(self.pause):
                now = time.monotonic()
                if self.stack.executor.popen and self.stack.executor.popen.poll() is None:
                    self._served += now - last
                last = now
                self.history.append(self._sample(now))
        except BaseException as error:
            self.failure = error

    def _sample(self, now: float) -> Sample:
        path = self.stack.state / "executor/ledger.db"
        sample = Sample(now, self._served, ledger=None, record=None)
        with contextlib.suppress(OSError, sqlite3.Error), _reading(path) as db:
            rows = db.execute("SELECT account, key, job FROM sessions ORDER BY seq").fetchall()
            sample = Sample(
                now, self._served, self._which(path), tuple(self._session(job) for *_, job in rows),
                tuple(db.execute("SELECT gpu, session FROM claims")),
                tuple((account, key) for account, key, _ in rows if key), None,
            )  # fmt: skip
        record = None
        with contextlib.suppress(OSError, sqlite3.Error), _reading(self.stack.state / "server.db") as db:
            record = {id: self._session(body) for id, body in db.execute("SELECT id, body FROM jobs")}
        return Sample(**{**sample.__dict__, "record": record, "boxes": tuple(self._boxes())})

    def _which(self, ledger: Path) -> int:
        """Another number for another file."""
        fd = os.open(ledger, os.O_RDONLY | os.O_CLOEXEC)
        number = os.fstat(fd).st_ino
        if self._ledgers.setdefault(number, fd) != fd:
            os.close(fd)
        return number

    def _session(self, job: str) -> Session:
        if job not in self._parsed:
            self._parsed[job] = wire.session(json.loads(job))
        return self._parsed[job]

    def _boxes(self) -> Iterator[tuple[str, Box]]:
        if self.stack.driver == "oci":
            for path in (self.stack.state / "executor/oci/sessions").glob("*/sandbox.json"):
                with contextlib.suppress(OSError):  # removed just now
                    found = json.loads(path.read_text())
                    pid = found["init"]["pid"] if found.get("init") else 0
                    yield found["id"], self._box(pid, found["cgroup"], found["labels"])
        else:
            for path in (self.stack.root / "docker/containers").glob("*/config.v2.json"):
                with contextlib.suppress(OSError, ValueError):  # removed, or being written, just now
                    found = json.loads(path.read_text())
                    labels = found["Config"]["Labels"] or {}
                    if "beaker.session" in labels:
                        pid = found["State"]["Pid"]
                        yield labels["beaker.session"], self._box(pid, f"/docker/{found['ID']}", labels)

    def _box(self, pid: int, cgroup: str, labels: dict[str, str]) -> Box:
        limits = json.loads(labels.get("beaker.job") or "{}").get("limits") or {}
        processes = self._cgroups.processes(cgroup)
        return Box(pid if pid in processes else 0, len(processes), tuple(limits.get("gpus") or ()))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """One moment of a database that somebody else writes."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0.5)) as db:
        db.execute("BEGIN")
        yield db


def foreign(stack: Stack) -> list[str]:
    """I9: what is in a home and belongs neither to its user nor to the user's own subordinate ids."""
    found = []
    for user in stack.users:
        allowed = [range(user.uid, user.uid + 1)]
        allowed += [range(s, s + n) for name, s, n in userns.ranges(userns.ETC / "subuid") if name == user.name]
        for top, directories, files in os.walk(user.home):
            for path in (os.path.join(top, name) for name in (*directories, *files)):
                with contextlib.suppress(FileNotFoundError):
                    owner = os.lstat(path).st_uid
                    if not any(owner in ids for ids in allowed):
                        found.append(f"I9: {path} belongs to {owner}")
    return found
