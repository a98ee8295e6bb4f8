"""A damaged ledger: whatever is wrong with the file, an executor starts, loses no claim, and gives no GPU twice."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from beaker_sessions import ids
from beaker_sessions.errors import Error
from beaker_sessions.executor import inventory, ledgerfile, plan
from beaker_sessions.executor.inside import Inside
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.lifecycle import Lifecycle
from beaker_sessions.executor.loop import Loop
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Gpu, Request, State
from beaker_sessions.sandbox import LABEL_OWNER, Found, Status
from beaker_sessions.sandbox.fake import FakeSandboxes, _Process
from beaker_sessions.settings import ExecutorSettings
from tests.stack import wait_for

WHO = inventory.unix_user(1)  # somebody of every machine
GPUS = tuple(Gpu(f"lab/gpu={number}", "made up") for number in range(5))
FLIPS, SEED = 40, 10
PAGE, HEADER = 4096, 24  # bytes of a page of SQLite, and of its header in the log


def wanted(gpus: int, *command: str) -> Request:
    return Request(gpus=gpus, cpus=0.5, memory=0, image="base", bare=True, command=command)


class Frozen(FakeSandboxes):
    """What runs, as another executor left it: it can be neither ended nor lost."""

    def __init__(self, found: list[Found]) -> None:
        super().__init__()
        self._found = {one.id: one for one in found}
        self.given: list[str] = []

    def create(self, spec: object) -> None:
        self.given += list(spec.gpus)  # type: ignore[attr-defined]
        super().create(spec)  # type: ignore[arg-type]

    def remove(self, id: str) -> None:
        assert id not in self._found or self._found[id].status is not Status.RUNNING, f"{id} runs and is removed"
        super().remove(id)

    def start(self, id: str, size: tuple[int, int] | None) -> None:
        if id in self._processes:
            super().start(id, size)


class Node:
    """An executor's part that decides, without its door."""

    loop: ClassVar[Loop]
    inside: ClassVar[Inside]

    def __init__(self, directory: Path, driver: FakeSandboxes) -> None:
        self.ledger, self.driver = Ledger(directory / "ledger.db"), driver
        self.sessions = Sessions(self.ledger, Inventory("gpu-1", 8.0, 1 << 36, GPUS))
        settings = ExecutorSettings(storage_path=str(directory))
        self.lifecycle = Lifecycle(self.sessions, driver, settings, self.inside, "test")

    def state(self, id: str) -> State:
        return self.sessions.view(id).session.state


@pytest.fixture(scope="module", autouse=True)
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    Node.loop = Loop()
    thread = threading.Thread(target=Node.loop.asyncio.run_forever)
    thread.start()
    directory = tmp_path_factory.mktemp("inside")
    Node.inside = Inside(Node.loop, directory, ExecutorSettings().endpoint, lambda _: None)
    yield
    for id in {*Node.inside.directories.ids(), *Node.inside._listeners}:
        Node.inside.close(id)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), Node.loop.asyncio).result()
    Node.loop.soon(Node.loop.asyncio.stop)
    thread.join()
    Node.loop.passing.stop()
    Node.loop.asyncio.close()


class Left:
    """What an executor that was killed left: its files, and what runs, by its GPUs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        node = Node(directory, FakeSandboxes())
        node.lifecycle.reconcile()
        make = node.sessions.create
        for number in range(12):
            self._end(node, make("daemon", WHO, wanted(1, "true"), f"key{number}").id)
        first, second, third = (make("daemon", WHO, wanted(1), None).id for _ in range(3))
        large = make("daemon", WHO, wanted(3), None).id  # waits for the first's GPU
        wait_for("what runs", lambda: all(node.state(id) == State.STARTED for id in (first, second, third)))
        node.ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # the rest is in the log alone
        self._end(node, first)
        self._end(node, second)
        running = [third, large, make("daemon", WHO, wanted(1), None).id]  # the last on what was the second's GPU
        wait_for("what runs", lambda: all(node.state(id) == State.STARTED for id in running))
        self.queued = [make("daemon", WHO, wanted(2), None).id for _ in range(2)]
        found = {one.id: one for one in node.driver.list()}
        self.found = [
            Found(id, {**found[id].labels, LABEL_OWNER: "test"}, Status.RUNNING, 1, started=found[id].started)
            for id in running
        ]
        self.gpus = {id: json.loads(found[id].labels[plan.LABEL_JOB])["limits"]["gpus"] for id in running}
        assert sum(map(len, self.gpus.values())) == len(GPUS)
        files = ["ledger.db", "ledger.db-wal", "ledger.db-shm"]
        self.log = {name: (directory / name).read_bytes() for name in files}
        node.ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.whole = {name: (directory / name).read_bytes() for name in files}
        assert len(self.log["ledger.db-wal"]) > 50_000, "damage of the log would not matter"
        node.ledger.close()

    def files(self, name: str) -> dict[str, bytes]:
        """Those of a moment at which damage of this one matters."""
        return self.log if name == "ledger.db-wal" else self.whole

    @staticmethod
    def _end(node: Node, id: str) -> None:
        def ended() -> bool:
            if node.state(id) == State.STARTED and node.driver._processes[id].command != ("true",):
                node.lifecycle.stop(id, "daemon")
            node.lifecycle._examine(id)
            return node.state(id) == State.FINALIZED

        wait_for("an end", ended)

    def restarted(self, directory: Path, name: str, damage: Callable[[Path], None]) -> tuple[bool, int]:
        """Start an executor on damaged copies; whether it noticed, and how many of those that waited still do."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        for file, data in self.files(name).items():
            (directory / file).write_bytes(data)
        damage(directory)
        driver = Frozen(self.found)
        node = Node(directory, driver)
        with closing(node.ledger):
            for _ in range(3):  # the second sees what the first has ended
                node.lifecycle.reconcile()
                wait_for("clean-up", lambda: all(one.state != State.EXITED for one in node.sessions.live()))
            assert node.lifecycle.ready.is_set()
            held = {one.id: list(one.claim.gpus) for one in node.sessions.live() if one.claim}
            assert {id: held.get(id) for id in self.gpus} == self.gpus or node.sessions.cordoned
            claimed = node.ledger._rows("SELECT gpu, session FROM claims")
            assert node.sessions.cordoned or {(gpu, id) for id, gpus in held.items() for gpu in gpus} == set(claimed)
            if not node.sessions.cordoned:
                node.sessions.create("daemon", WHO, wanted(1), None)
            assert not driver.given, "all are taken"
            return bool(node.ledger.damage), sum(id in {one.id for one in node.sessions.live()} for id in self.queued)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    logging.disable()
    try:
        return Left(tmp_path_factory.mktemp("left"))
    finally:
        logging.disable(logging.NOTSET)


def flipped(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["ledger.db", "ledger.db-wal"])
def test_a_flipped_bit_anywhere(left: Left, tmp_path: Path, name: str) -> None:
    chance, noticed, kept = random.Random(SEED), 0, 0
    for _ in range(FLIPS):
        bit = chance.randrange(8 * len(left.files(name)[name]))
        try:
            found, waiting = left.restarted(tmp_path / "node", name, lambda directory: flipped(directory / name, bit))  # noqa: B023
        except BaseException as error:
            error.add_note(f"bit {bit} of {name} was flipped")
            raise
        noticed, kept = noticed + found, kept + (waiting == len(left.queued))
    if name == "ledger.db":
        assert noticed > FLIPS / 4
        assert kept > FLIPS * 0.9, "what waits is saved but where it was hit itself"


@pytest.mark.parametrize("name", ["ledger.db", "ledger.db-wal"])
def test_cut_off_at_every_page(left: Left, tmp_path: Path, name: str) -> None:
    whole = left.files(name)[name]
    for length in range(0, len(whole), PAGE if name == "ledger.db" else 2 * (PAGE + HEADER)):

        def damage(directory: Path, length: int = length) -> None:
            (directory / name).write_bytes(whole[:length])

        left.restarted(tmp_path / "node", name, damage)


@pytest.mark.parametrize("what", ["zeros", "directory", "link", "gone"])
@pytest.mark.parametrize("name", ["ledger.db", "ledger.db-wal", "ledger.db-shm"])
def test_something_else_in_the_place_of_a_file(left: Left, tmp_path: Path, name: str, what: str) -> None:
    def damage(directory: Path) -> None:
        path = directory / name
        data = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)
        if what == "zeros":
            path.write_bytes(bytes(len(data)))
        elif what == "directory":
            path.mkdir()
        elif what == "link":
            path.symlink_to("nowhere")

    left.restarted(tmp_path / "node", name, damage)


@pytest.mark.parametrize("labels", [{}, {plan.LABEL_JOB: "{", plan.LABEL_UID: "1"}, {plan.LABEL_JOB: "{}"}])
def test_of_what_runs_unknown_no_gpu_is_given_until_it_ends(tmp_path: Path, labels: dict[str, str]) -> None:
    """Neither the ledger nor its labels say what it holds."""
    id = ids.ulid()
    one = Found(id, {**labels, LABEL_OWNER: "test"}, Status.RUNNING, 4711)
    driver = Frozen([one])
    node = Node(tmp_path, driver)
    with closing(node.ledger):
        node.lifecycle.reconcile()
        assert f"kill -9 {one.pid}" in node.sessions.cordoned
        with pytest.raises(Error, match=id):
            node.sessions.create("daemon", WHO, wanted(1), None)
        del driver._found[id]  # by hand
        node.lifecycle.reconcile()
        assert not node.sessions.cordoned
        driver._found[id] = one
        node.lifecycle.reconcile()
        assert node.sessions.cordoned
        driver._found[id] = replace(one, status=Status.EXITED, exit_code=137)
        driver._processes[id] = _Process((), lambda: None, False)
        node.lifecycle.reconcile()
        assert (node.sessions.cordoned, driver.list()) == ("", [])


def test_a_start_that_the_ledger_still_has_to_do_takes_nothing_of_what_runs(left: Left, tmp_path: Path) -> None:
    """Its latest changes were lost: the end of one session, and that another has run since with what that had."""
    before = Node(tmp_path, FakeSandboxes())
    before.lifecycle.reconcile()
    before.sessions.on_start = lambda _: None
    stale = [before.sessions.create("daemon", WHO, wanted(1), None).id for _ in GPUS]
    before.ledger.close()
    driver = Frozen(left.found)
    node = Node(tmp_path, driver)
    with closing(node.ledger):
        for _ in range(2):
            node.lifecycle.reconcile()
            wait_for("clean-up", lambda: not node.lifecycle._busy)
        assert not driver.given
        assert {one.id: list(one.claim.gpus) for one in node.sessions.live() if one.claim} == left.gpus
        assert {node.sessions.view(id).session.error for id in stale} == {"conflict"}
        assert not node.sessions.cordoned


def test_what_ended_unknown_to_the_ledger_is_told_and_keeps_no_node_from_starting(left: Left, tmp_path: Path) -> None:
    ended = replace(left.found[0], status=Status.EXITED, exit_code=3, pid=0)
    driver = Frozen([ended, *left.found[1:]])
    node = Node(tmp_path, driver)
    with closing(node.ledger):
        node.lifecycle.reconcile()
        assert node.lifecycle.ready.is_set()
        wait_for("its end", lambda: node.state(ended.id) == State.FINALIZED)
        assert node.sessions.view(ended.id).session.exit_code == 3
        assert [node.state(one.id) for one in left.found[1:]] == [State.STARTED] * (len(left.found) - 1)
        assert not node.sessions.cordoned


def test_one_bad_row_costs_one_session(left: Left, tmp_path: Path) -> None:
    """A text that is still JSON, and no longer the one that was written: a GPU's number, say."""

    def damage(directory: Path) -> None:
        ledger = Ledger(directory / "ledger.db")
        ledger._db.execute("UPDATE sessions SET job = replace(job, 'gpu=0', 'gpu=1') WHERE state = 'started'")
        ledger.close()

    assert left.restarted(tmp_path / "node", "ledger.db", damage) == (True, 2)
    ledger = Ledger(tmp_path / "node/ledger.db")
    assert not ledger.damage
    assert len(ledger.final(100)) == 14
    assert len(ledgerfile.put_aside(tmp_path / "node/ledger.db")) == 1
    ledger.close()


def test_damage_that_is_found_later_is_told(tmp_path: Path) -> None:
    ledger, told = Ledger(tmp_path / "ledger.db"), list[str]()
    ledger.on_damage = told.append
    ledger.fact("node", "N" * 100_000)
    ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    ledger._db.execute("PRAGMA cache_size = 0")
    (tmp_path / "ledger.db").write_bytes(b"no database" * 20_000)
    with pytest.raises(Exception, match="ledger"):  # noqa: PT012
        for _ in range(2):
            ledger.fact("node")
    assert len(told) == 1
    assert str(tmp_path / "ledger.db") in told[0]
    ledger.close()
