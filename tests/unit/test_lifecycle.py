"""What a driver does at the worst moment: fails as none should, or changes between a look at it and the act."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor.inside import Inside
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.lifecycle import EACH, THREADS, Lifecycle
from beaker_sessions.executor.loop import Loop
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Gpu, Identity, Request, State
from beaker_sessions.sandbox import Found, Image, Spec, Status
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.settings import ExecutorSettings
from tests.stack import wait_for

ANN = Identity("ann", 1500, 1500, "/home/ann")
WANTED = Request(gpus=1, cpus=1.0, memory=0, image="base", bare=True, command=("true",))


@pytest.fixture
def lifecycle(tmp_path: Path) -> Iterator[Lifecycle]:
    ledger, loop = Ledger(tmp_path / "ledger.db"), Loop()
    thread = threading.Thread(target=loop.asyncio.run_forever)
    thread.start()
    sessions = Sessions(ledger, Inventory("gpu-1", 8.0, 1 << 36, (Gpu("lab/gpu=0", "made up"),)))
    settings = ExecutorSettings(storage_path=str(tmp_path))
    inside = Inside(loop, tmp_path / "sessions", settings.endpoint, lambda _: None)
    lifecycle = Lifecycle(sessions, FakeSandboxes(), settings, inside, "test")
    lifecycle.reconcile()
    yield lifecycle
    wait_for("nothing to be done", lambda: not lifecycle._busy)
    for found in lifecycle.sandboxes.list():
        lifecycle.sandboxes.remove(found.id)
    for id in {*inside.directories.ids(), *inside._listeners}:
        inside.close(id)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop.asyncio).result()
    wait_for("what was dropped to be closed", lambda: not loop.passing._dropping)
    loop.soon(loop.asyncio.stop)
    thread.join()
    loop.passing.stop()
    loop.asyncio.close()
    ledger.close()


@pytest.mark.parametrize("call", ["image", "create", "offer", "start", "logs"])
@pytest.mark.parametrize("raised", [ValueError("no layers"), KeyError("digest"), TypeError(), OSError(5, "io")])
def test_what_a_start_raises_ends_the_session_and_frees_its_gpus(
    lifecycle: Lifecycle,
    call: str,
    raised: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(lifecycle.sessions if call == "offer" else lifecycle.sandboxes, call, fail)
    if call == "logs":  # with which the clean-up begins
        monkeypatch.setattr(lifecycle.sandboxes, "image", fail)
    caplog.set_level(logging.WARNING)
    sessions = lifecycle.sessions
    id = sessions.create("ann", ANN, WANTED, None).id
    wait_for("its end", lambda: sessions.view(id).session.state == State.FINALIZED, 20)
    ended = sessions.view(id).session
    assert (ended.error, ended.exit_code) == ("internal", None)
    found = re.search(r"incident (\w{26})", ended.message)
    assert found
    assert f"incident {found[1]}" in [record.getMessage() for record in caplog.records if record.exc_info]
    assert sessions.free().gpus == 1
    assert lifecycle.sandboxes.list() == []


def test_a_removal_that_fails_unexpectedly_is_tried_again(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, calls = lifecycle.sandboxes.remove, []

    def fail_once(id: str) -> None:
        calls.append(id)
        if len(calls) == 1:
            raise KeyError("pid")
        remove(id)

    monkeypatch.setattr(lifecycle.sandboxes, "remove", fail_once)
    id = lifecycle.sessions.create("ann", ANN, WANTED, None).id
    wait_for("its start", lambda: lifecycle.sessions.view(id).session.state == State.STARTED)
    lifecycle.reconcile()
    wait_for("its end", lambda: lifecycle.sessions.view(id).session.state == State.FINALIZED)
    assert calls == [id, id]
    assert lifecycle.sessions.free().gpus == 1


class Stale:
    """A `list` whose answer is old by the time it is there: it is taken, then held back until `let_go`."""

    def __init__(self, lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch) -> None:
        self._list, self.taken, self.let_go = lifecycle.sandboxes.list, threading.Event(), threading.Event()
        monkeypatch.setattr(lifecycle.sandboxes, "list", self._answer)
        self._thread = threading.Thread(target=lifecycle.reconcile)

    def _answer(self) -> list[Found]:
        found = self._list()
        self.taken.set()
        assert self.let_go.wait(20)
        return found

    def begin(self) -> None:
        self._thread.start()
        assert self.taken.wait(20)

    def end(self) -> None:
        self.let_go.set()
        self._thread.join()


@pytest.fixture
def stale(lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch) -> Stale:
    return Stale(lifecycle, monkeypatch)


def held(lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch, call: str) -> tuple[threading.Event, threading.Event]:
    """Have the driver wait in a call: an event that says that it is there, and one that lets it go on."""
    there, on = threading.Event(), threading.Event()
    act = getattr(lifecycle.sandboxes, call)

    def wait(*args: object, **kwargs: object) -> object:
        there.set()
        assert on.wait(20)
        return act(*args, **kwargs)

    monkeypatch.setattr(lifecycle.sandboxes, call, wait)
    return there, on


@pytest.mark.parametrize("call", ["create", "start"])
def test_a_list_from_before_a_start_harms_nothing_that_has_started(
    lifecycle: Lifecycle, stale: Stale, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    there, on = held(lifecycle, monkeypatch, call)
    id = lifecycle.sessions.create("ann", ANN, replace(WANTED, command=("cat",)), None).id
    assert there.wait(20)
    stale.begin()
    on.set()
    wait_for("its start", lambda: lifecycle.sessions.view(id).session.state == State.STARTED and not lifecycle._busy)
    stale.end()
    wait_for("nothing to be done", lambda: not lifecycle._busy)
    assert lifecycle.sessions.view(id).session.state == State.STARTED
    assert [(found.id, found.status) for found in lifecycle.sandboxes.list()] == [(id, Status.RUNNING)]


def test_a_list_from_before_an_end_cleans_up_once(
    lifecycle: Lifecycle, stale: Stale, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there, on = held(lifecycle, monkeypatch, "remove")
    id = lifecycle.sessions.create("ann", ANN, WANTED, None).id
    wait_for("its start", lambda: lifecycle.sessions.view(id).session.state == State.STARTED)
    lifecycle._examine(id)
    assert there.wait(20)
    stale.begin()
    on.set()
    wait_for("its end", lambda: lifecycle.sessions.view(id).session.state == State.FINALIZED and not lifecycle._busy)
    stale.end()
    wait_for("nothing to be done", lambda: not lifecycle._busy)
    assert not [record for record in caplog.records if record.exc_info]


def test_what_a_list_shows_but_is_gone_is_not_adopted(lifecycle: Lifecycle, stale: Stale) -> None:
    id = lifecycle.sessions.create("ann", ANN, replace(WANTED, command=("cat",)), None).id
    wait_for("its start", lambda: lifecycle.sessions.view(id).session.state == State.STARTED)
    with lifecycle.sessions._lock, lifecycle.sessions.ledger.transaction() as db:  # as one that was lost
        del lifecycle.sessions._live[id]
        db.execute("DELETE FROM claims")
        db.execute("DELETE FROM sessions")
    stale.begin()
    lifecycle.sandboxes.remove(id)
    stale.end()
    assert (lifecycle.sessions.live(), lifecycle.sessions.cordoned) == ([], "")


BY = "made by an executor that was killed"


@pytest.mark.parametrize(
    ("status", "kept"), [(Status.CREATED, True), (Status.RUNNING, True), (Status.EXITED, False), (None, False)]
)
def test_a_start_that_was_interrupted_goes_on_where_it_was(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch, status: Status | None, kept: bool
) -> None:
    """What has ended by itself before it ran anything is made again."""
    sessions, sandboxes = lifecycle.sessions, lifecycle.sandboxes
    monkeypatch.setattr(sessions, "on_start", lambda _: None)  # its executor is killed
    id = sessions.create("ann", ANN, replace(WANTED, command=("cat",)), None).id
    if status:
        sandboxes.create(Spec(id, {BY: ""}, Image("fake:base", "base"), ANN, ("cat",)))
    if status is Status.RUNNING:
        sandboxes.start(id, None)
    elif status is Status.EXITED:
        sandboxes._found[id] = replace(sandboxes._found[id], status=status, exit_code=1)  # type: ignore[attr-defined]
    lifecycle.reconcile()
    wait_for("its start", lambda: sessions.view(id).session.state == State.STARTED and not lifecycle._busy)
    assert [found.status for found in sandboxes.list()] == [Status.RUNNING]
    assert (BY in sandboxes.list()[0].labels) is kept


def test_many_creates_at_once_start_in_order_and_few_at_a_time(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandboxes, create, now, most, order = lifecycle.sandboxes, lifecycle.sandboxes.create, [0], [0, 0], []
    lock, threads = threading.Lock(), threading.active_count()

    def count(spec: Spec) -> None:
        with lock:
            now[0] += 1
            order.append(spec.id)
            most[:] = max(most[0], now[0]), max(most[1], threading.active_count() - threads)
        create(spec)
        with lock:
            now[0] -= 1

    monkeypatch.setattr(sandboxes, "create", count)
    wanted = replace(WANTED, gpus=0, cpus=0.0)
    ids = [lifecycle.sessions.create("ann", ANN, wanted, None).id for _ in range(200)]
    for id in ids:
        wait_for("its start", lambda id=id: lifecycle.sessions.view(id).session.started)  # type: ignore[misc]
    assert sorted(order) == sorted(ids)
    late = [id for place, id in enumerate(ids) if abs(order.index(id) - place) > EACH]
    assert len(late) < len(ids) / 20, "but for a few that the machine held up on their way"
    assert most[0] <= max(2, len(os.sched_getaffinity(0)))
    assert most[1] <= 2 * THREADS


def test_what_waits_for_an_image_or_a_home_holds_nobody_up(
    lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, on = lifecycle.sandboxes.image, threading.Event()

    def slow(reference: str, *args: object) -> Image:
        if reference == "slow":
            assert on.wait(20)
        return image("base", *args)  # type: ignore[arg-type]

    monkeypatch.setattr(lifecycle.sandboxes, "image", slow)
    create, wanted = lifecycle.sessions.create, replace(WANTED, gpus=0, cpus=0.0)
    late = [create("ann", ANN, replace(wanted, image="slow"), None).id for _ in range(50)]
    mine = create("ann", ANN, wanted, None).id
    id = create("bob", ANN, wanted, None).id
    wait_for("its start", lambda: lifecycle.sessions.view(id).session.started)
    assert not any(lifecycle.sessions.view(id).session.started for id in (*late, mine))
    on.set()
    wait_for("the others'", lambda: all(lifecycle.sessions.view(id).session.started for id in (*late, mine)))


def test_the_end_of_all_tells_them_before_and_leaves_the_queue(lifecycle: Lifecycle) -> None:
    sessions = lifecycle.sessions
    first = sessions.create("ann", ANN, replace(WANTED, command=()), None).id
    waits = sessions.create("ann", ANN, replace(WANTED, command=()), None).id
    wait_for("its start", lambda: sessions.view(first).session.state == State.STARTED)
    lifecycle.reconcile()
    said: list[str] = []
    stop = lifecycle.sandboxes.stop

    def stopped(id: str, grace: float) -> None:
        said.append(f"{grace:g} {sessions.view(id).notice}")
        stop(id, grace)
        lifecycle.reconcile()  # which sees the end, as the watch does elsewhere

    lifecycle.sandboxes.stop = stopped  # type: ignore[method-assign]
    assert lifecycle.end_all("the shutdown") == []
    assert said == ["10 this machine ends all its sessions: save your work, 10 s are left"]
    ended = sessions.view(first).session
    assert (ended.state, ended.message) == (State.FINALIZED, "stopped by the shutdown")
    assert sessions.view(waits).session.state == State.CREATED
    with pytest.raises(Error, match="takes no new sessions: all sessions end"):
        sessions.create("ann", ANN, WANTED, None)


def test_a_session_ends_with_its_machine_and_not_when_that_is_back(lifecycle: Lifecycle) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    began, last = now - timedelta(hours=3), now - timedelta(hours=2)
    sessions = lifecycle.sessions
    sessions.on_start = lambda _: None
    id = sessions.create("ann", ANN, WANTED, None).id
    sessions.move(id, State.STARTED, started=began)
    sessions.ledger.fact("boot", "another")
    os.utime(Path(lifecycle.settings.storage_path, "executor/alive"), (last.timestamp(), last.timestamp()))
    again = Lifecycle(sessions, lifecycle.sandboxes, lifecycle.settings, lifecycle.inside, "test")
    again.reconcile()
    wait_for("its end", lambda: sessions.view(id).session.state == State.FINALIZED)
    ended = sessions.view(id).session
    assert (ended.exited, ended.message) == (last, "the machine was restarted")


def test_a_token_that_comes_after_the_end_is_not_kept(lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, id = lifecycle.inside, "01HW8DZJFR6QEAFAABCTCR2BY2"

    class Server:
        def __init__(self, *_: object) -> None:
            pass

        def create_token(self, _body: object, key: str) -> dict[str, str]:
            del key
            inside.close(id)
            return {"token": "late"}

        def close(self) -> None:
            pass

    monkeypatch.setattr("beaker_sessions.executor.inside.Client", Server)
    inside.directories.make(id)
    inside.introduce(id, "its author's")
    with pytest.raises(Error, match="has ended"):
        inside._token(id)
    assert inside.directories.ids() == []


def test_a_stop_ends_what_waits_behind_starts_that_hang(lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch) -> None:
    image, on = lifecycle.sandboxes.image, threading.Event()

    def slow(*args: object) -> Image:
        assert on.wait(20)
        return image("base", *args[1:])  # type: ignore[arg-type]

    monkeypatch.setattr(lifecycle.sandboxes, "image", slow)
    wanted = replace(WANTED, gpus=0, cpus=0.0)
    ids = [lifecycle.sessions.create("ann", ANN, wanted, None).id for _ in range(EACH + 1)]
    view = lifecycle.sessions.view
    wait_for("the first to begin", lambda: lifecycle._unbegun == {ids[-1]})
    lifecycle.stop(ids[-1], "ann")
    wait_for("its end", lambda: view(ids[-1]).session.state == State.FINALIZED)
    assert view(ids[-1]).session.message == "stopped by ann before it was started"
    on.set()
    wait_for("the others", lambda: all(view(id).session.started for id in ids[:-1]))
    assert view(ids[-1]).session.started is None
    wait_for("nothing to be done", lambda: not lifecycle._busy)
