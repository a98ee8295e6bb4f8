"""Each invariant that the recorder watches can fail, and a good history breaks none."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from beaker_sessions.model import Claim, Request, Resources, Session, State
from tests.invariants import CHECKS, Box, History, Sample, violations

NODE = Resources(2, 8.0, 8 << 30)
NOW = datetime(2026, 1, 1, tzinfo=UTC)
WAITS = Session("A", "ada", "", Request(gpus=1, cpus=2.0, memory=1 << 30))
CLAIM = Claim(("x=0",), 2.0, 1 << 30)
RUNS = replace(WAITS, state=State.STARTED, claim=CLAIM)
ENDED = replace(RUNS, state=State.EXITED, exit_code=0)
FINAL = replace(ENDED, state=State.FINALIZED, finalized=NOW)
BOX = ("A", Box(7, 3, ("x=0",)))
EMPTY = ("A", Box(0, 0, ("x=0",)))


def sample(at: float, *sessions: Session, boxes: tuple[tuple[str, Box], ...] = (), **more: object) -> Sample:
    held = tuple((gpu, s.id) for s in sessions if s.claim and s.state is not State.FINALIZED for gpu in s.claim.gpus)
    return Sample(at, **{"served": at, "ledger": sessions, "claims": held, "boxes": boxes} | more)  # type: ignore[arg-type]


def another(session: Session, **changes: object) -> Session:
    return replace(session, id="B", **changes)  # type: ignore[arg-type]


def test_a_whole_life_breaks_nothing():
    history = [
        sample(0, WAITS),
        sample(1, replace(RUNS, state=State.SCHEDULED)),
        sample(2, RUNS, boxes=(BOX,)),
        Sample(3, 2.5, ledger=None, record=None, boxes=(BOX,)),
        sample(4, ENDED, boxes=(EMPTY,)),
        sample(5, FINAL, another(WAITS), record={"A": FINAL}),
    ]
    assert violations(history, NODE) == []


def test_an_executor_that_is_down_releases_nothing_and_breaks_nothing():
    history = [sample(0, RUNS, boxes=(BOX,)), sample(60, RUNS, boxes=(EMPTY,), served=1), sample(61, FINAL, served=2)]
    assert violations(history, NODE) == []


def test_a_lost_ledger_begins_anew():
    history = [sample(0, WAITS, RUNS), sample(1, another(RUNS), generation=2)]
    assert not any(what.startswith("I3") for what in violations(history, NODE))


BROKEN: dict[str, tuple[str, History]] = {
    "one gpu, two sessions": ("I1", [sample(0, RUNS, another(RUNS))]),
    "one gpu, two sandboxes": ("I1", [sample(0, RUNS, boxes=(BOX, ("B", BOX[1])))]),
    "a claim without its session": ("I1", [sample(0, WAITS, claims=(("x=0", "A"),))]),
    "a session without its claim": ("I1", [sample(0, RUNS, claims=())]),
    "more memory than there is": ("I2", [sample(0, replace(RUNS, claim=Claim((), 0.0, 9 << 30)))]),
    "more cpus than there are": ("I2", [sample(0, RUNS, another(RUNS, claim=Claim(("x=1",), 7.0)))]),
    "forgotten": ("I3", [sample(0, WAITS), sample(1)]),
    "one key, two sessions": ("I3", [sample(0, keys=(("ada", "k"), ("ada", "k")))]),
    "one session, two sandboxes": ("I3", [sample(0, RUNS, boxes=(BOX, BOX))]),
    "begun again": ("I4", [sample(0, RUNS, boxes=(BOX,)), sample(1, RUNS, boxes=(("A", Box(8, 1)),))]),
    "killed": ("I4", [sample(0, RUNS), sample(1, replace(ENDED, exit_code=137))]),
    "lost": ("I4", [sample(0, RUNS), sample(1, replace(FINAL, exit_code=None, message="removed"))]),
    "final and running": ("I5", [sample(0, RUNS, boxes=(BOX,)), sample(1, FINAL, boxes=(BOX,))]),
    "held for long": ("I5", [sample(0, RUNS, boxes=(BOX,)), sample(1, ENDED), sample(12, ENDED)]),
    "another exit code": ("I6", [sample(0, FINAL), sample(1, replace(FINAL, exit_code=1))]),
    "alive again": ("I6", [sample(0, FINAL), sample(1, RUNS)]),
    "another in the record": (
        "I6",
        [sample(0, record={"A": FINAL}), sample(1, record={"A": replace(FINAL, message="else")})],
    ),
    "ahead of its turn": ("I7", [sample(0, replace(WAITS, request=Request(gpus=2)), another(RUNS))]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_broken_is_told(what: str):
    name, history = BROKEN[what]
    assert name in {found.partition(":")[0] for found in violations(history, NODE)}
    assert list(CHECKS[name](history, NODE))


def test_whoever_delays_nobody_may_go_ahead():
    waits = replace(WAITS, request=Request(gpus=3, cpus=0.0, memory=0))
    small = another(RUNS, claim=Claim((), 1.0, 1 << 20))
    assert violations([sample(0, waits, small)], NODE) == []


def test_a_stop_and_a_lack_of_memory_are_reasons_to_end():
    stopped = replace(FINAL, exit_code=137, canceled=NOW)
    hungry = replace(FINAL, exit_code=137, message="out of memory: a process of this session was killed")
    for end in (stopped, hungry):
        assert violations([sample(0, RUNS), sample(1, end)], NODE) == []
