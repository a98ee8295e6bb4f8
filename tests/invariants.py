"""The invariants I1 to I7 as pure functions of what was seen of one system over time: each says what broke it.

A history is of samples in the order they were taken. Within a sample the ledger was read first, then the sandboxes, so
that what the ledger calls final must not run any more. Nothing here reads anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from beaker_sessions.executor.plan import amount
from beaker_sessions.model import LIVE, Resources, Session, State

RELEASE = 10.0  # seconds in which what an ended session held must be free


@dataclass(frozen=True)
class Box:
    """A sandbox that exists. pid: of its init, 0 when it does not run. processes: how many are in its cgroup.

    gpus: as its own label has them, whatever the ledger says.
    """

    pid: int
    processes: int
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """at: in seconds. served: for how many seconds since the first sample the executor has run. generation: of the
    ledger's file. ledger: its sessions in order of arrival, None when it could not be read. claims: (GPU, session).
    record: the server's view of sessions, None when unreadable. boxes: by session, one for each sandbox.
    """

    at: float
    served: float
    generation: int = 0
    ledger: tuple[Session, ...] | None = ()
    claims: tuple[tuple[str, str], ...] = ()
    keys: tuple[tuple[str, str], ...] = ()  # (account, idempotency key)
    record: Mapping[str, Session] | None = field(default_factory=dict)
    boxes: tuple[tuple[str, Box], ...] = ()


History = Sequence[Sample]


def gpus_are_in_one_session(history: History, capacity: Resources) -> Iterator[str]:  # noqa: ARG001
    """I1, by sessions, by claims, and by what runs."""
    for sample in history:
        live = [s for s in sample.ledger or () if s.state in LIVE and s.claim]
        for what, held in (
            ("sessions", [gpu for s in live if s.claim for gpu in s.claim.gpus]),
            ("claims", [gpu for gpu, _ in sample.claims]),
            ("sandboxes", [gpu for _, box in sample.boxes if box.processes for gpu in box.gpus]),
        ):
            yield from (f"{gpu} is in {count} {what}" for gpu, count in Counter(held).items() if count > 1)
        if sample.ledger is not None:
            for gpu, id in {(g, s.id) for s in live if s.claim for g in s.claim.gpus} ^ set(sample.claims):
                yield f"{gpu} of {id} is held by a session or a claim alone"


def claims_fit(history: History, capacity: Resources) -> Iterator[str]:
    """I2."""
    for sample in history:
        claimed = sum((s.claim.amount for s in sample.ledger or () if s.state in LIVE and s.claim), Resources())
        if not claimed.fits(capacity):
            yield f"{claimed} are claimed of {capacity}"


def creates_exist_once(history: History, capacity: Resources) -> Iterator[str]:  # noqa: ARG001
    """I3. A session that the ledger has had is in it for good, unless the ledger itself is lost; a key makes one."""
    known: set[str] = set()
    generation = None
    for sample in history:
        yield from (f"{n} sessions of {key}" for key, n in Counter(sample.keys).items() if n > 1)
        yield from (f"{n} sandboxes of {id}" for id, n in Counter(id for id, _ in sample.boxes).items() if n > 1)
        if sample.ledger is None:
            continue
        ids = {s.id for s in sample.ledger}
        if sample.generation != generation:
            generation, known = sample.generation, set()
        yield from (f"{id} is not in the ledger any more" for id in known - ids)
        known |= ids


def live_sessions_go_on(history: History, capacity: Resources) -> Iterator[str]:  # noqa: ARG001
    """I4. What has started ends by a stop, by an exit code of its own, or for its memory; and is never begun again."""
    pids: dict[str, int] = {}
    started: set[str] = set()
    for sample in history:
        for id, box in sample.boxes:
            if box.pid and pids.setdefault(id, box.pid) != box.pid:
                yield f"{id} has become process {box.pid}, it was {pids[id]}"
                pids[id] = box.pid
        for s in sample.ledger or ():
            if s.state is State.STARTED:
                started.add(s.id)
            elif s.id in started and s.canceled is None and (s.exit_code is None or s.exit_code == 137):
                started.discard(s.id)
                if "out of memory" not in s.message:
                    yield f"{s.id} was ended by nobody: exit code {s.exit_code}, {s.message!r}"


def claims_end_with_their_processes(history: History, capacity: Resources) -> Iterator[str]:  # noqa: ARG001
    """I5. Time counts while an executor runs."""
    ran: set[str] = set()
    empty: dict[str, float] = {}
    for sample in history:
        boxes = dict(sample.boxes)
        for id, box in boxes.items():
            if box.processes:
                ran.add(id)
                empty.pop(id, None)
        if sample.ledger is None:
            continue
        for s in sample.ledger:
            box = boxes.get(s.id)
            if s.state is State.FINALIZED:
                if box and box.processes:
                    yield f"{s.id} is final, and {box.processes} processes of it run"
                empty.pop(s.id, None)
            elif s.id in ran and not (box and box.processes):
                since = empty.setdefault(s.id, sample.served)
                if sample.served - since > RELEASE:
                    yield f"{s.id} has ended, and holds its claim {sample.served - since:.0f} s later"
                    ran.discard(s.id)


def final_is_final(history: History, capacity: Resources) -> Iterator[str]:  # noqa: ARG001
    """I6, in the ledger and in the server's record."""
    final: dict[tuple[str, str], tuple] = {}
    for sample in history:
        for where, sessions in (("ledger", sample.ledger or ()), ("record", (sample.record or {}).values())):
            for s in sessions:
                now = (s.state, s.exit_code, s.finalized, s.message, s.revision)
                was = final.get((where, s.id))
                if was is not None and was != now:
                    yield f"{s.id} in the {where} was {was} and is {now}"
                if s.state is State.FINALIZED:
                    final[where, s.id] = now


def the_queue_keeps_its_order(history: History, capacity: Resources) -> Iterator[str]:
    """I7. Whoever is ahead of one that waits takes nothing that the latter could use, even if it started right now."""
    for sample in history:
        sessions = sample.ledger or ()
        free = capacity - sum((s.claim.amount for s in sessions if s.state in LIVE and s.claim), Resources())
        ahead, waiting = Resources(), ""
        for s in sessions:  # in order of arrival
            if s.state is State.CREATED:
                ahead, waiting = ahead + amount(s.request), s.id
            elif s.state in LIVE and s.claim and waiting:
                has, left = s.claim.amount, free - ahead
                short = (has.gpus and left.gpus < 0, has.cpus and left.cpus < -1e-3, has.memory and left.memory < 0)
                if any(short):
                    yield f"{s.id} has gone ahead of {waiting}, and takes what it waits for"


CHECKS: dict[str, Callable[[History, Resources], Iterator[str]]] = {
    "I1": gpus_are_in_one_session,
    "I2": claims_fit,
    "I3": creates_exist_once,
    "I4": live_sessions_go_on,
    "I5": claims_end_with_their_processes,
    "I6": final_is_final,
    "I7": the_queue_keeps_its_order,
}


def violations(history: History, capacity: Resources) -> list[str]:
    """All that broke an invariant, each once."""
    found = (f"{name}: {what}" for name, check in CHECKS.items() for what in check(history, capacity))
    return list(dict.fromkeys(found))
