"""A node whose ledger is gone, and a server that knows what was there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest

from beaker_sessions.executor.access import Access
from beaker_sessions.executor.inside import Inside
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.lifecycle import Lifecycle
from beaker_sessions.executor.loop import Loop
from beaker_sessions.executor.metrics import Metrics
from beaker_sessions.executor.report import Reporter
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import State
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.settings import ExecutorSettings


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[Callable[[str], Reporter]]:
    """One that starts with a ledger of this name; it starts no session."""
    with ExitStack() as stack:

        def start(name: str) -> Reporter:
            settings = ExecutorSettings(
                storage_path=str(tmp_path), cluster="lab/main", accounts={"games": "ann"}, default_image="base"
            )  # fmt: skip
            ledger, loop = Ledger(tmp_path / name), Loop()  # which does not run
            stack.callback(ledger.close)
            stack.callback(loop.passing.stop)
            stack.callback(loop.asyncio.close)
            sessions = Sessions(ledger, Inventory("node-1", 8.0, 1 << 36, ()))
            inside = Inside(loop, tmp_path / "run", settings.endpoint, lambda _: None)
            lifecycle = Lifecycle(sessions, FakeSandboxes(), settings, inside, "owner")
            sessions.on_start = lambda _id: None
            lifecycle.reconcile()
            access = Access(ledger, settings.endpoint, settings.accounts)
            metrics = Metrics(sessions, lifecycle.sandboxes, str(tmp_path), dict)
            return Reporter(lifecycle, access, settings, metrics)

        yield start


def test_what_a_node_has_lost_is_queued_again_or_ended(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    first = executor("ledger.db")
    first._register(client)
    everything = {"cpuCount": 8}
    wanted = {"node": "node-1", "image": {"beaker": "base"}, "command": ["true"], "bare": True, "requests": everything}
    ids = [ann.create_job({"session": wanted})["id"] for _ in range(3)]
    first._heartbeat(client)
    first._report(client)
    assert [session.state for session in first.sessions.live()] == [State.SCHEDULED, State.CREATED, State.CREATED]

    second = executor("new.db")
    second._register(client)
    second._heartbeat(client)
    assert second.sessions.live() == []  # what was acknowledged is not handed on again
    second.sessions.cordon("test", "not now")
    assert not second._compare(client)
    second.sessions.cordon("test", "")
    assert second._compare(client)
    second._report(client)
    ended, *queued = (ann.get_job(id) for id in ids)
    assert ended["status"]["finalized"]
    assert "lost its record" in ended["status"]["message"]
    assert [(session.id, session.state) for session in second.sessions.live()] == [
        (ids[1], State.SCHEDULED), (ids[2], State.CREATED)
    ]  # fmt: skip
    assert ["scheduled" in job["status"] for job in queued] == [True, False]
