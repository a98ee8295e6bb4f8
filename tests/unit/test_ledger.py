"""The ledger keeps its constraints whatever is asked of it, and survives what happens to its file."""

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from beaker_sessions import ids
from beaker_sessions.errors import Error
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.model import Claim, Identity, Request, Session, State

ADA = Identity("ada", 1500, 1500, "/home/ada", {1500: "ada", 44: "video"})
NOW = datetime.now(UTC)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path):
    ledger = Ledger(path)
    yield ledger
    ledger.close()


def waiting(**changes):
    request = Request(image="base", gpus=1, cpus=1.0, memory=1 << 30)
    return replace(Session(ids.ulid(), "ada", "node", request, created=NOW, revision=1), **changes)


def scheduled(ledger, session, *gpus):
    return ledger.move(session, replace(session, state=State.SCHEDULED, scheduled=NOW, claim=Claim(gpus, 1.0, 1)))


def test_a_gpu_is_claimed_once(ledger):
    first, second = waiting(), waiting()
    for session in (first, second):
        ledger.add(session, ADA, None, "")
    scheduled(ledger, first, "example.com/gpu=0")
    with pytest.raises(Error) as refused:
        scheduled(ledger, second, "example.com/gpu=0")
    assert refused.value.code == "conflict"
    assert [s.state for s, _ in ledger.live()] == [State.SCHEDULED, State.CREATED]


def test_a_claim_is_free_again_only_when_final(ledger):
    first, second = waiting(), waiting()
    ledger.add(first, ADA, None, "")
    ledger.add(second, ADA, None, "")
    first = scheduled(ledger, first, "gpu")
    first = ledger.move(first, replace(first, state=State.EXITED, exited=NOW))
    with pytest.raises(Error):
        scheduled(ledger, second, "gpu")
    ledger.move(first, replace(first, state=State.FINALIZED, finalized=NOW))
    assert scheduled(ledger, second, "gpu").claim == Claim(("gpu",), 1.0, 1)


def test_a_final_state_never_changes(ledger):
    session = waiting()
    ledger.add(session, ADA, None, "")
    final = ledger.move(session, replace(session, state=State.FINALIZED, finalized=NOW))
    with pytest.raises(ValueError, match="final"):
        ledger.move(final, replace(final, message="no"))


def test_states_move_only_forward(ledger):
    session = waiting()
    ledger.add(session, ADA, None, "")
    with pytest.raises(ValueError, match="cannot go from created to started"):
        ledger.move(session, replace(session, state=State.STARTED, started=NOW))


def test_a_stale_writer_is_refused(ledger):
    session = waiting()
    ledger.add(session, ADA, None, "")
    ledger.move(session, replace(session, message="newer"))
    with pytest.raises(ValueError, match="has changed"):
        ledger.move(session, replace(session, message="stale"))


def test_everything_is_there_after_reopening(ledger, path):
    session = waiting()
    ledger.add(session, ADA, "key", "print")
    session = scheduled(ledger, session, "gpu")
    again = Ledger(path)
    assert again.live() == [(session, ADA)]
    assert again.by_key("ada", "key") == (session, "print")
    assert again.by_key("bob", "key") is None
    assert [s.id for s in again.unreported()] == [session.id]
    again.reported(session.id, session.revision)
    assert again.unreported() == []
    again.close()


def test_all_or_nothing(ledger):
    first, second = waiting(), waiting()
    with pytest.raises(RuntimeError), ledger.transaction():  # noqa: PT012
        ledger.add(first, ADA, None, "")
        ledger.add(second, ADA, None, "")
        raise RuntimeError("the power fails")
    assert ledger.live() == []


def test_a_corrupt_file_is_put_aside(path):
    path.write_bytes(b"this is not a database" * 1000)
    ledger = Ledger(path)
    assert ledger.damage
    assert ledger.live() == []
    assert [p.read_bytes()[:4] for p in path.parent.glob("ledger.db.damaged-*")] == [b"this"]
    ledger.close()


def test_nobody_but_root_reads_what_was_run(tmp_path: Path):
    path = tmp_path / "executor" / "ledger.db"
    path.parent.mkdir()
    path.touch(mode=0o644)  # as an earlier version left it
    ledger = Ledger(path)
    ledger.fact("node", "N1")
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    ledger.close()
    assert modes == {"ledger.db": 0o600, "ledger.db-wal": 0o600, "ledger.db-shm": 0o600}
