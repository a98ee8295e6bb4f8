"""What an executor tells a server whose database was restored: all that the backup does not know, and nothing twice."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from beaker_sessions import ids, wire
from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.executor.access import Access
from beaker_sessions.executor.admission import Limits
from beaker_sessions.executor.inside import Inside
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.lifecycle import Lifecycle
from beaker_sessions.executor.loop import Loop
from beaker_sessions.executor.metrics import Metrics
from beaker_sessions.executor.report import NOBODY, Reporter
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Request, Session, State
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.server.main import main
from beaker_sessions.settings import ExecutorSettings
from tests.unit.server.test_faults import end, initialize, serve


@pytest.fixture
def reporter(tmp_path: Path) -> Iterator[Reporter]:
    settings = ExecutorSettings(storage_path=str(tmp_path / "node"))
    loop, ledger = Loop(), Ledger(tmp_path / "node/ledger.db")
    inside = Inside(loop, tmp_path / "run", settings.endpoint, lambda _: None)
    sessions = Sessions(ledger, Inventory("gpu-1", 8.0, 1 << 36, ()), Limits())
    lifecycle = Lifecycle(sessions, FakeSandboxes(("base",)), settings, inside, "owner")
    access = Access(ledger, settings.endpoint, settings.accounts)
    yield Reporter(lifecycle, access, settings, Metrics(sessions, lifecycle.sandboxes, str(tmp_path), dict))
    ledger.close()
    loop.passing.stop()
    loop.asyncio.close()


def turn(reporter: Reporter, client: Client) -> None:
    """What the reporter's thread does, until the server has heard all."""
    for _ in range(3):
        try:
            if not reporter._registered:
                reporter._register(client)
            reporter._heartbeat(client)
            reporter._report(client)
        except Error as error:
            if error.code != "not_found":
                raise


def test_sessions_since_the_backup_are_known_again(tmp_path: Path, reporter: Reporter) -> None:
    state, words = tmp_path / "state", ["--storage-path", str(tmp_path / "state")]
    state.mkdir()
    tokens = initialize(state)
    ledger = reporter.ledger
    process, port = serve(state)
    address = f"http://127.0.0.1:{port}"

    def connect(token: str) -> Client:
        reporter.settings = replace(reporter.settings, address=address, insecure_addresses=[address])
        return Client(reporter.settings.endpoint, token)

    def session(account: str = "ann", age: int = 60) -> Session:
        made = datetime.now(UTC) - timedelta(seconds=age)
        one = Session(ids.ulid(), account, "", Request(), created=made, revision=1)
        ledger.add(one, NOBODY, None, "")
        return one

    with closing(connect(tokens["token"])) as ann, closing(connect(tokens["executor.token"])) as executor:
        turn(reporter, executor)
        first = session()
        turn(reporter, executor)
        asked = ann.create_job({"session": {"node": "gpu-1"}})["id"]  # which the backup has as not taken
        assert main([*words, "backup", str(tmp_path / "beaker.db")]) == 0
        ann.create_account({"name": "late"})
        ledger.add(replace(wire.session(ann.get_job(asked)), revision=2), NOBODY, None, "")  # taken since
        reporter.instance, reporter._registered = ids.ulid(), False  # the executor was started again
        second, strange = session(), session("late")
        ended = ledger.move(first, replace(first, state=State.FINALIZED, finalized=datetime.now(UTC)))
        turn(reporter, executor)
        assert {job["id"] for job in ann.jobs()} == {first.id, second.id, strange.id, asked}
        assert ledger.unreported() == []
    forgotten = ledger.get(asked)
    assert forgotten
    with ledger.transaction() as db:  # it has ended, and a thousand since
        db.execute("DELETE FROM sessions WHERE id = ?", (asked,))
    end(process, signal.SIGKILL)
    assert main([*words, "restore", str(tmp_path / "beaker.db")]) == 0

    process, port = serve(state, port)
    try:
        with closing(connect(tokens["token"])) as ann, closing(connect(tokens["executor.token"])) as executor:
            assert {job["id"] for job in ann.jobs()} == {first.id, asked}
            with pytest.raises(Error) as caught:
                ann.get_job(second.id)
            assert caught.value.code == "not_found"
            turn(reporter, executor)
            known = {job["id"]: job for job in ann.jobs()}
            assert set(known) == {first.id, second.id, asked}, "not that of an account which is not there"
            assert "finalized" in known[ended.id]["status"]
            # It ran here before, and is not run again.
            assert "ended here before" in known[asked]["status"]["message"]
            assert reporter._registered
            assert not reporter.sessions.drained
            before = ledger.fact("met")
            turn(reporter, executor)
            assert ledger.fact("met") == before
    finally:
        end(process, signal.SIGTERM)
