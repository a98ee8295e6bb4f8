"""A driver that fails as no driver should: what a start raises ends that session, whose claim is free again."""

from __future__ import annotations

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
from beaker_sessions.executor.lifecycle import Lifecycle
from beaker_sessions.executor.loop import Loop
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Gpu, Identity, Request, State
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
    for session in sessions.live():
        inside.close(session.id)
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
