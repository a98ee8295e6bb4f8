"""A node whose ledger is gone, and a server that knows what was there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from beaker_sessions import ids, wire
from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.executor import report
from beaker_sessions.executor.access import Access
from beaker_sessions.executor.inside import Inside
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.lifecycle import Lifecycle
from beaker_sessions.executor.loop import Loop
from beaker_sessions.executor.metrics import Metrics
from beaker_sessions.executor.report import NOBODY, Reporter
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Request, Session, State
from beaker_sessions.sandbox import Found, Status
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.server import tables
from beaker_sessions.server.jobs import job_of
from beaker_sessions.settings import ExecutorSettings
from beaker_sessions.transport import Endpoint

WANTED = {"node": "node-1", "image": {"beaker": "base"}, "command": ["true"], "bare": True}


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[Callable[[str], Reporter]]:
    """One that starts with a ledger of this name; it starts no session."""
    with ExitStack() as stack:

        def start(name: str) -> Reporter:
            settings = ExecutorSettings(
                storage_path=str(tmp_path), cluster="lab/main", accounts={"games": "ann"}, default_image="base",
                token_path=str(tmp_path / "executor.token"),
            )  # fmt: skip
            ledger, loop = Ledger(tmp_path / name), Loop()  # which does not run
            stack.callback(ledger.close)
            stack.callback(loop.passing.stop)
            stack.callback(loop.asyncio.close)
            sessions = Sessions(ledger, Inventory("node-1", 8.0, 1 << 36, ()))
            inside = Inside(loop, tmp_path / "run", settings.endpoint, lambda _: None)
            lifecycle = Lifecycle(sessions, FakeSandboxes(), settings, inside, "owner")
            sessions.on_start = lambda _id: None
            access = Access(ledger, settings.endpoint, settings.accounts)
            metrics = Metrics(sessions, lifecycle.sandboxes, str(tmp_path), dict)
            reporter = Reporter(lifecycle, access, settings, metrics)
            lifecycle.reconcile()
            return reporter

        yield start


def test_what_a_node_has_lost_is_queued_again_or_ended(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    first = executor("ledger.db")
    first._register(client)
    everything = {"cpuCount": 8}
    wanted = {**WANTED, "requests": everything}
    made = [ann.create_job({"session": wanted})["id"] for _ in range(3)]
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
    ended, *queued = (ann.get_job(id) for id in made)
    assert ended["status"]["finalized"]
    assert "lost its record" in ended["status"]["message"]
    assert [(session.id, session.state) for session in second.sessions.live()] == [
        (made[1], State.SCHEDULED), (made[2], State.CREATED)
    ]  # fmt: skip
    assert ["scheduled" in job["status"] for job in queued] == [True, False]


def turn(reporter: Reporter, client: Client) -> None:
    """What the reporter's thread does, with a heartbeat; a server that does not know the node is asked once more."""
    for _ in range(2):
        reporter._due = 0.0
        try:
            reporter._turn(client)
        except Error as error:
            if error.code != "not_found":
                raise


def record(server: SimpleNamespace, id: str, **values: object) -> None:
    with server.service.store.write() as rows:
        rows.update(tables.jobs, id, **values)


def test_what_no_node_has_taken_comes_with_its_heartbeat_and_token(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    turn(executor("ledger.db"), client)
    id = ann.create_job({"session": WANTED})["id"]  # while the executor starts again
    server.client(server.admin).update_node("node-1", {"cordoned": True})
    again = executor("ledger.db")
    turn(again, client)
    assert again._compared
    assert again.ledger.get(id) is None  # it does not start on a cordoned node
    server.client(server.admin).update_node("node-1", {"cordoned": False})
    turn(again, client)
    assert again.ledger.get(id)
    assert again.lifecycle.inside.directories.token(id)
    with server.service.store.read() as rows:
        assert job_of(rows, id).handed


def test_a_cordoned_node_keeps_the_token_that_came_with_the_first_hand_over(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    reporter, client = executor("ledger.db"), server.client(server.executor)
    turn(reporter, client)
    id = server.client(server.ann).create_job({"session": WANTED})["id"]
    job = client.get_job(id)
    inside = reporter.lifecycle.inside
    inside.keep_token(id, "its own")
    for source in ("test", ""):
        reporter.sessions.cordon("test", source)
        if not source:  # it runs, and was not adopted yet
            reporter.lifecycle.sandboxes._found[id] = Found(id, {}, Status.RUNNING, 1)  # type: ignore[attr-defined]
        reporter._take({key: value for key, value in job.items() if key != "token"})
        assert inside.directories.token(id) == "its own"
        assert reporter.ledger.get(id) is None


def test_what_is_adopted_by_older_labels_ends_at_the_server_too(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    first = executor("ledger.db")
    turn(first, client)
    id = ann.create_job({"session": WANTED})["id"]
    turn(first, client)
    labelled, identity = first.ledger.get(id) or pytest.fail("not taken")
    assert labelled.state == State.SCHEDULED
    now = datetime.now(UTC)
    for _ in range(5):
        first.sessions.move(id)
    first.sessions.move(id, State.STARTED, started=now)
    turn(first, client)
    second = executor("new.db")
    second.sessions.adopt(replace(labelled, state=State.STARTED, started=now), identity)  # as by its container
    second.lifecycle.ready.clear()
    turn(second, client)
    second.sessions.ended(id, 0)
    second.sessions.release(id)
    turn(second, client)
    assert ann.get_job(id)["status"]["exitCode"] == 0
    assert "finalized" in ann.get_job(id)["status"]
    assert second.ledger.unreported() == []
    ended = second.ledger.get(id)
    assert ended
    assert ended[0].revision == ann.get_job(id)["revision"]
    assert executor("new.db").ledger.damage == ""


def test_an_equal_revision_of_another_state_is_outdone_once_ended(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    reporter = executor("ledger.db")
    turn(reporter, client)
    id = ann.create_job({"session": WANTED})["id"]
    turn(reporter, client)
    reporter.sessions.move(id, State.STARTED, started=datetime.now(UTC))
    turn(reporter, client)
    reporter.sessions.ended(id, 0)
    reporter.sessions.release(id)
    (ended,) = reporter.ledger.unreported()
    other = replace(ended, state=State.STARTED, exited=None, finalized=None, exit_code=None)
    client.report_job(id, wire.job(other))
    turn(reporter, client)
    assert "finalized" in ann.get_job(id)["status"]
    assert reporter.ledger.unreported() == []


def test_a_session_of_another_node_holds_up_no_report(
    server: SimpleNamespace, executor: Callable[[str], Reporter], caplog: pytest.LogCaptureFixture
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    reporter = executor("ledger.db")
    turn(reporter, client)
    foreign, own = (ann.create_job({"session": WANTED})["id"] for _ in range(2))
    reporter._due = 0.0
    reporter._heartbeat(client)
    other = server.client(server.client(server.admin).create_token({"name": "node-2", "scope": "executor"})["token"])
    limits = {"cpuCount": 8, "memory": "1GiB", "gpuCount": 0, "gpuIds": []}
    body = {"hostname": "node-2", "limits": limits, "instance": ids.ulid()}
    record(server, foreign, node_id=other.register_node("lab/main", body)["id"], taken=datetime.now(UTC))
    turn(reporter, client)
    assert reporter.ledger.unreported() == []
    assert ann.get_job(own)["revision"] > 0
    assert ann.get_job(foreign)["revision"] == 0, "only its own node reports it"
    assert f"refuses session {foreign}" in caplog.text


@pytest.mark.parametrize("damage", ["status", "session", "everything"])
def test_what_cannot_be_read_holds_up_no_heartbeat(
    server: SimpleNamespace, executor: Callable[[str], Reporter], damage: str
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    first = executor("ledger.db")
    turn(first, client)
    broken, other = (ann.create_job({"session": WANTED})["id"] for _ in range(2))
    turn(first, client)
    body = client.get_job(broken)
    whole = {"status": body, "session": {**body, "session": 5}, "everything": {"status": {}}}[damage]
    if damage == "status":
        del body["status"]
    second = executor("new.db")

    class Damaged(Client):
        def jobs(self, **filters: str | bool | int | None) -> Iterator[dict]:
            for job in super().jobs(**filters):
                yield whole if job["id"] == broken else job

    damaged = Damaged(Endpoint(server.address, insecure=[server.address]), server.executor)
    turn(second, damaged)
    damaged.close()
    assert second.heard
    assert second._compared
    assert second.ledger.get(other)
    if damage != "everything":
        turn(second, client)
        assert "finalized" in ann.get_job(broken)["status"]


def test_a_server_that_has_lost_the_node_is_registered_at_again(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, first = server.client(server.executor), executor("ledger.db")
    turn(first, client)
    again = executor("ledger.db")
    again._register(client)
    with server.service.store.write() as rows:  # an older database
        rows.update(tables.nodes, again.ledger.fact("node") or "", deleted=datetime.now(UTC))
        for token in rows.all(tables.tokens, scope="executor"):
            rows.update(tables.tokens, token.id, node_id=None, hostname=None)
    turn(again, client)
    assert again._registered
    assert again._compared
    assert again.heard


def test_a_waiting_session_that_the_server_has_as_ended_does_not_run_again(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    first = executor("ledger.db")
    turn(first, client)
    id = ann.create_job({"session": {**WANTED, "requests": {"cpuCount": 8}}})["id"]
    turn(first, client)
    taken, identity = first.ledger.get(id) or pytest.fail("not taken")
    first.sessions.move(id, State.STARTED, started=datetime.now(UTC))
    first.sessions.ended(id, 3)
    first.sessions.release(id)
    turn(first, client)
    second = executor("new.db")  # the last changes of which are lost
    created = replace(taken, state=State.CREATED, claim=None, scheduled=None, revision=1)
    second.ledger.add(created, identity, None, "")
    second.ledger.reported(id, 1)
    third = executor("new.db")
    assert third.sessions.cordoned == ""
    turn(third, client)
    ended = third.ledger.get(id)
    assert ended
    assert (ended[0].state, ended[0].exit_code) == (State.FINALIZED, 3)
    turn(third, client)
    assert third.ledger.unreported() == []


def test_what_waits_starts_once_the_server_was_asked(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client = server.client(server.executor)
    first = executor("ledger.db")
    turn(first, client)
    for id in (ids.ulid(), ids.ulid()):
        waiting = Session(id, "ann", first._node, Request(image="beaker://base", bare=True), created=datetime.now(UTC))
        first.ledger.add(replace(waiting, revision=1), NOBODY, None, "")
    asked = executor("ledger.db")
    assert {session.state for session in asked.sessions.live()} == {State.CREATED}
    turn(asked, client)
    assert {session.state for session in asked.sessions.live()} == {State.SCHEDULED}


def test_a_server_that_does_not_answer_holds_nothing_back(
    executor: Callable[[str], Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = executor("ledger.db")
    waiting = Session(ids.ulid(), "ann", "", Request(image="beaker://base", bare=True), created=datetime.now(UTC))
    reporter.ledger.add(replace(waiting, revision=1), NOBODY, None, "")
    reporter = executor("ledger.db")

    class End(BaseException):
        pass

    def sleep(_seconds: float) -> None:
        raise End

    monkeypatch.setattr(report, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(End):
        reporter._loop()  # there is no token
    assert [session.state for session in reporter.sessions.live()] == [State.SCHEDULED]


def test_a_node_whose_id_is_not_written_down_takes_no_other_nodes_sessions(
    server: SimpleNamespace, executor: Callable[[str], Reporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = server.client(server.client(server.admin).create_token({"name": "node-2", "scope": "executor"})["token"])
    limits = {"cpuCount": 8, "memory": "1GiB", "gpuCount": 0, "gpuIds": []}
    body = {"hostname": "node-2", "limits": limits, "instance": ids.ulid()}
    node = other.register_node("lab/main", body)["id"]
    session = Session(ids.ulid(), "ann", node, Request(image="beaker://base", bare=True), created=datetime.now(UTC))
    other.report_job(session.id, wire.job(replace(session, revision=1)))
    reporter, client = executor("ledger.db"), server.client(server.executor)
    monkeypatch.setattr(reporter.ledger, "note", lambda _name, _value: None)  # the disk is full
    turn(reporter, client)
    assert reporter.heard
    assert reporter._compared
    assert reporter.ledger.get(session.id) is None


def test_what_is_final_at_the_server_stays_so_and_nothing_is_outdone_twice(
    server: SimpleNamespace, executor: Callable[[str], Reporter], caplog: pytest.LogCaptureFixture
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    reporter = executor("ledger.db")
    turn(reporter, client)
    id = ann.create_job({"session": WANTED})["id"]
    turn(reporter, client)
    sent: list[dict] = []

    class Ahead(Client):  # it has always heard of more
        def report_job(self, id: str, body: dict) -> dict:
            sent.append(body)
            return super().report_job(id, body) | {"revision": body["revision"] + 7}

    ahead = Ahead(Endpoint(server.address, insecure=[server.address]), server.executor)
    reporter.sessions.move(id)
    turn(reporter, ahead)
    ahead.close()
    assert [body["revision"] for body in sent] == [3, 11]
    assert "does not take session" in caplog.text
    assert reporter.ledger.unreported() == []
    (session,) = reporter.sessions.live()
    ended = replace(session, state=State.FINALIZED, finalized=datetime.now(UTC), revision=99)
    client.report_job(id, wire.job(ended))
    reporter.sessions.move(id)
    turn(reporter, client)
    assert reporter.ledger.unreported() == []
    assert (ann.get_job(id)["revision"], reporter.sessions.live()[0].revision) == (99, 12)
    assert "has ended, says the server" in caplog.text


def test_an_executor_that_another_has_replaced_reports_nothing(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    first = executor("ledger.db")
    turn(first, client)
    id = ann.create_job({"session": WANTED})["id"]
    turn(first, client)
    executor("new.db")._register(client)
    before = ann.get_job(id)
    first.sessions.move(id)
    with pytest.raises(Error, match="another executor") as caught:
        first._report(client)
    assert caught.value.code == "conflict"
    assert ann.get_job(id) == before
    assert first.ledger.unreported()


def test_a_database_restored_since_the_heartbeat_costs_no_report_and_no_output(
    server: SimpleNamespace, executor: Callable[[str], Reporter]
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    reporter = executor("ledger.db")
    turn(reporter, client)
    id = ann.create_job({"session": WANTED})["id"]
    turn(reporter, client)
    reporter.sessions.ended(id, 0)
    reporter.sessions.release(id)
    output = reporter.lifecycle.output / id
    output.write_bytes(b"42")
    reporter.ledger.fact("epoch", "another database")
    with server.service.store.write() as rows:  # of before this executor has registered
        rows.update(tables.nodes, reporter._node, instance="0")
    with pytest.raises(Error) as caught:
        reporter._report(client)
    assert caught.value.code == "not_found"
    assert output.exists()
    turn(reporter, client)
    assert "finalized" in ann.get_job(id)["status"]
    assert ann.get_logs(id) == b"42"


def test_a_full_disk_ends_no_reporting(
    server: SimpleNamespace,
    executor: Callable[[str], Reporter],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    client, ann = server.client(server.executor), server.client(server.ann)
    reporter = executor("ledger.db")
    turn(reporter, client)
    ann.create_job({"session": {**WANTED, "requests": {"cpuCount": 8}}})
    turn(reporter, client)

    def full(*_: object) -> None:
        raise Error("storage_full", "the disk is full")

    third = ann.create_job({"session": {**WANTED, "requests": {"cpuCount": 8}}})["id"]
    again = executor("ledger.db")
    again.ledger.report_anew("as after a restore")
    with monkeypatch.context() as patch:
        patch.setattr(again.ledger, "add", full)
        turn(again, client)
        turn(again, client)
        assert again.heard
        assert "the disk is full" in caplog.text
        assert again.ledger.get(third) is None
        assert again.ledger.unreported() == []
    turn(again, client)
    assert again.sessions.entry(third)

    (other := executor("ledger.db")).sessions.hold_back(True)
    monkeypatch.setattr(other.sessions, "schedule", full)
    pauses: list[float] = []

    class End(BaseException):
        pass

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise End

    monkeypatch.setattr(report, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    with pytest.raises(End):
        other._loop()
    assert not other.sessions.held_back
