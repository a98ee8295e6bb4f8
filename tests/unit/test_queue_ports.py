"""Sessions that wait for ports hold up nobody else, and keep their place."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.ports import Ports
from beaker_sessions.executor.publishing import Publisher
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Gpu, Identity, Request, State
from beaker_sessions.sandbox.fake import FakeSandboxes

RANGE = range(21300, 21303)
GPU = Request("image", gpus=1)
WEB = Request("image", gpus=1, ports=((80, 0),))
WHO = Identity("ada", 1000, 1000, "/home/ada")


class Ended(FakeSandboxes):
    """Each of its sandboxes ends just now."""

    def init(self, id: str) -> int | None:
        del id
        return None


@pytest.fixture
def sessions(tmp_path: Path) -> Iterator[Sessions]:
    ledger = Ledger(tmp_path / "ledger.db")
    made = Sessions(ledger, Inventory("n", 8.0, 1 << 36, (Gpu("lab/gpu=0", "made up"),)), ports=Ports(RANGE))
    yield made
    made.ports.drop(())
    ledger.close()


@pytest.fixture
def taken() -> Iterator[ExitStack]:
    """Every port of the range is some user's program's, until it is closed."""
    with ExitStack() as stack:
        for port in RANGE:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        yield stack


def end(sessions: Sessions, id: str) -> None:
    sessions.ended(id, 0)
    sessions.release(id)


def test_who_finds_no_port_waits_and_the_others_go_on(sessions: Sessions, taken: ExitStack) -> None:
    started: list[str] = []
    sessions.on_start = started.append
    first = sessions.create("dan", WHO, GPU, None)
    bob = sessions.create("bob", WHO, WEB, None)
    ada = sessions.create("ada", WHO, GPU, None)
    end(sessions, first.id)
    assert started == [first.id, ada.id], "bob's, without a port, does not hold the GPU back"
    cleo = sessions.create("cleo", WHO, Request("image", gpus=0), None)
    assert started[2:] == [cleo.id]
    end(sessions, ada.id)
    view = sessions.view(bob.id)
    assert (view.session.state, view.position) == (State.CREATED, 1)
    assert "no port" in view.reason
    eve = sessions.create("eve", WHO, Request("image", gpus=0, ports=((80, 0),)), None)
    assert sessions.view(eve.id).session.state == State.CREATED
    taken.close()
    later = sessions.create("ada", WHO, GPU, None)
    assert started[3:] == [bob.id, eve.id], "in the order in which they came"
    assert sessions.view(later.id).reason.startswith("needs 1 GPU")


def test_what_was_claimed_is_started_though_a_later_one_fails(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    sessions.on_start = started.append
    first = sessions.create("dan", WHO, Request("image", cpus=8.0), None)
    one, two = (sessions.create(who, WHO, Request("image", cpus=1.0), None) for who in ("ada", "bob"))
    sessions.ended(first.id, 0)
    started.clear()
    move = sessions.ledger.move

    def fail(old, wanted, actor):  # type: ignore[no-untyped-def]
        if old.id == two.id:
            raise Error("storage_full", "the disk is full")
        return move(old, wanted, actor)

    monkeypatch.setattr(sessions.ledger, "move", fail)
    with pytest.raises(Error, match="full"):
        sessions.release(first.id)
    assert started == [one.id]


def test_no_program_is_run_while_others_wait_for_the_lock(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    run, owned = subprocess.run, []

    def note(*args, **kwargs):  # type: ignore[no-untyped-def]
        owned.append(sessions._lock._is_owned())  # type: ignore[attr-defined]
        return run(*args, **kwargs)

    monkeypatch.setattr(subprocess, "run", note)
    with socket.create_server(("127.0.0.1", RANGE[0])), pytest.raises(Error, match="another program"):
        sessions.create("ada", WHO, Request("image", ports=((80, RANGE[0]),)), None)
    assert owned == [False]


def test_an_author_is_told_that_a_port_is_somebody_elses_by_now(sessions: Sessions) -> None:
    """Its forwarder was killed, and the port taken before it came again."""
    web = sessions.create("ada", WHO, Request("image", gpus=0, ports=((80, 0),)), None)
    sessions.ports.drop(())
    started = sessions.move(web.id, State.STARTED, started=datetime.now(UTC))
    assert started.claim
    publisher = Publisher(sessions, Ended())
    ((_, port),) = started.claim.ports
    with socket.create_server(("127.0.0.1", port)):
        publisher.forward_again([started])
        assert str(port) in sessions.view(web.id).notice
        sessions.notice(web.id, "the disk", "the disk is full")
        sessions.notice(web.id, "the disk", "")
        assert str(port) in sessions.view(web.id).notice, "another's word does not take it back"
    publisher.forward_again([started])
    assert sessions.view(web.id).notice == ""
