"""The sessions of this node: their queue, their claims and who follows them. Every change of a session goes through
here.

Owns the in-memory view of the ledger: each change is committed there first, then shown. Must not call the sandbox
driver: what takes time is done by `lifecycle`, which is told through `on_start` and `on_exit`. Longer than 400 lines
since all of it is under one lock.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from .. import ids
from ..errors import Error
from ..model import LIVE, Claim, Identity, Request, Resources, Session, State
from ..sandbox import Progress, Terminal
from . import admission, claims, plan
from .inventory import Inventory
from .ledger import Ledger, held
from .ports import Ports
from .subscription import Subscription

log = logging.getLogger(__name__)

LOOKED = 200  # ended sessions among which a name is looked for
OUTCOME = (  # fields in which a session that has ended differs from one that waits
    "scheduled", "image_ready", "made", "started", "exited", "finalized", "canceled", "canceled_for", "exit_code",
    "message", "error",
)  # fmt: skip
LONG = 1.0  # seconds on the way to a prompt after which a write more is not felt


@dataclass
class Live:
    """What is known of a session that is not final, beside what the ledger holds.

    since: seconds of CLOCK_BOOTTIME when its main process started, which no change of the wall clock moves.
    changed: the driver told of its sandbox while it started. offered: a follower was given its streams in time.
    passed: moments of its start, as fields of the session, that its next change will write. notices: what its author
    should know, by whom it comes from. lacks: what it waits for beside what can be claimed, "" for nothing.
    """

    session: Session
    identity: Identity
    progress: Progress | None = None
    since: float | None = None
    changed: bool = False
    offered: bool = False
    notices: dict[str, str] = field(default_factory=dict)
    lacks: str = ""
    passed: dict[str, datetime] = field(default_factory=dict)
    subscribers: set[Subscription] = field(default_factory=set)

    def pulls(self) -> bool:
        """Whether its image is on the way."""
        ready = self.session.image_ready or "image_ready" in self.passed
        return self.session.state == State.SCHEDULED and self.progress is not None and not ready


@dataclass(frozen=True)
class View:
    """A session as a follower is told of it. position: 1 is next, 0 is not waiting.

    notice: what its author should know now, "" for nothing.
    """

    session: Session
    position: int = 0
    reason: str = ""
    progress: Progress | None = None
    notice: str = ""


class Sessions:
    """on_start(id): resources are claimed, start it. on_exit(id): its main process ended, clean up."""

    def __init__(
        self, ledger: Ledger, inventory: Inventory, limits: admission.Limits = admission.Limits(),  # noqa: B008
        ports: Ports | None = None,
    ) -> None:  # fmt: skip
        self.ledger, self.inventory, self.limits, self.ports = ledger, inventory, limits, ports or Ports()
        self.capacity = inventory.capacity
        self._cordons: dict[str, str] = {}  # who keeps this node from starting anything new -> why
        self.on_start: Callable[[str], None] = lambda _id: None
        self.on_exit: Callable[[str], None] = lambda _id: None
        self.on_change: Callable[[], None] = lambda: None  # there is something to report
        self.held_back = False
        self._lock = threading.RLock()
        self._live: dict[str, Live] = {}  # in order of arrival
        for session, identity in ledger.live():
            self._live[session.id] = Live(session, identity)

    # -- asking

    def live(self) -> list[Session]:
        """All sessions that are not final, in order of arrival."""
        with self._lock:
            return [live.session for live in self._live.values()]

    def identity(self, id: str) -> Identity:
        with self._lock:
            return self._live[id].identity if id in self._live else self._final(id)[1]

    def entry(self, id: str) -> Live | None:
        """The record of a session that is not final. Only `lifecycle` may change it, and only its own fields."""
        with self._lock:
            return self._live.get(id)

    def view(self, id: str) -> View:
        """Raises Error not_found."""
        with self._lock:
            live = self._live.get(id)
            if live is None:
                return View(self._final(id)[0])
            if live.session.state != State.CREATED:
                return View(live.session, progress=live.progress, notice="; ".join(live.notices.values()))
            waiting = [entry.session for entry in self._live.values() if entry.session.state == State.CREATED]
            index = next(i for i, session in enumerate(waiting) if session.id == id)
            amounts = [plan.amount(session.request) for session in waiting]
            why = self.cordoned or live.lacks or claims.reason(amounts, index, self.free())
            return View(live.session, index + 1, why)

    def views(self) -> list[View]:
        """All sessions that are not final, in order of arrival, as of one moment: no GPU is in two of them."""
        with self._lock:
            return [self.view(id) for id in self._live]

    def free(self) -> Resources:
        """What nobody has claimed; negative amounts where the machine shrank under its sessions."""
        with self._lock:
            return claims.free(self.capacity, (s.claim for s in self.live() if s.claim and s.state in LIVE))

    def resolve(self, reference: str | None, account: str) -> Session:
        """The session that a user means: an id, the name of one of theirs, or None for the only one they have here.

        A name means one that lives, else the last that had it.

        Raises Error not_found, or conflict when several match.
        """
        with self._lock:
            own = [s for s in self.live() if s.account == account]
            if reference is None:
                matches = [s for s in own if s.state != State.EXITED]
                if not matches:
                    raise Error("not_found", "you have no session on this node", "start one: beaker session create")
            elif ids.is_ulid(reference):
                return self.view(reference).session
            else:
                matches = [s for s in own if s.request.name == reference]
                if not matches:
                    for ended in self.ledger.final(LOOKED):
                        if (ended.account, ended.request.name) == (account, reference):
                            return ended
                    raise Error(
                        "not_found", f"no session {reference!r} is yours on this node", "see beaker session list"
                    )
            if len(matches) > 1:
                listed = ", ".join(f"{s.id} ({s.request.name})" if s.request.name else s.id for s in matches)
                raise Error("conflict", f"you have {len(matches)} sessions that match: {listed}", "name one by its id")
            return matches[0]

    def _of(self, account: str) -> list[Session]:
        return [session for session in self.live() if session.account == account]

    def _final(self, id: str) -> tuple[Session, Identity]:
        known = self.ledger.get(id)
        if known is None:
            raise Error("not_found", f"no session {id!r} on this node", "see beaker session list")
        return known

    # -- changing

    def create(
        self, account: str, identity: Identity, request: Request, key: str | None, id: str | None = None,
        revision: int = 1,
    ) -> Session:  # fmt: skip
        """A new session in the queue, or the one that was made with this key before. Durable when it returns.

        id, revision: given when the server took the create. Raises Error invalid when the node could never satisfy the
        request, conflict for a key that was used for another request, or a name or port in use, unavailable on a
        cordoned node, limit when the account has as much as one may.
        """
        self.ports.settle(request)
        fingerprint = hashlib.sha256(repr(replace(request, size=(0, 0))).encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            if key and (known := self.ledger.by_key(account, key)):
                if known[1] != fingerprint:
                    raise Error("conflict", "this idempotency key was used for another request", "use a new key")
                return known[0]
            if self.cordoned:
                raise Error(
                    "unavailable",
                    f"this node takes no new sessions: {self.cordoned}",
                    "choose another: beaker node list",
                )
            if request.name and ids.is_ulid(request.name):
                raise Error("invalid", f"--name: {request.name!r} looks like an id", "choose another name")
            if request.name and any(s.request.name == request.name and s.account == account for s in self.live()):
                raise Error(
                    "conflict",
                    f"you have a session named {request.name!r} already",
                    "attach to it, or choose another name",
                )
            self.ports.check(request, self.live())
            admission.within(self.limits, request, self._of(account))
            now = datetime.now(UTC)
            session = Session(
                id or ids.ulid(), account, self.ledger.fact("node") or "", request, created=now, revision=revision
            )
            before = {live.session.id: live.session for live in self._live.values()}
            try:
                with self.ledger.transaction():  # one commit for intent and claim: it is on the way to a prompt
                    self.ledger.add(session, identity, key, fingerprint)
                    self._live[session.id] = Live(session, identity)
                    starting = list(self._claim())
            except BaseException:
                self._live.pop(session.id, None)
                for other, was in before.items():
                    self._live[other].session = was
                self.ports.drop(before)
                raise
            for ready in starting:
                self.on_start(ready)
            self.on_change()
            return self._live[session.id].session

    def adopt(self, session: Session, identity: Identity) -> None:
        """Take up a session found by its container's labels that the ledger had lost, or a create that cannot start."""
        with self._lock:
            self.ledger.add(session, identity, None, "")
            if session.state != State.FINALIZED:
                self._live[session.id] = Live(session, identity)
            self.on_change()

    def recall(self, id: str, claim: Claim | None) -> bool:
        """A waiting session that was scheduled, which the ledger had lost: False if it does not wait.

        Raises Error conflict while another holds what it claims.
        """
        with self._lock:
            live = self._live.get(id)
            if live is None or live.session.state != State.CREATED:
                return False
            self.move(id, State.SCHEDULED, claim=claim, scheduled=datetime.now(UTC))
            return True

    def hold_back(self, held: bool) -> None:
        """Whether nothing of the queue is started for a moment; it takes more meanwhile."""
        with self._lock:
            was, self.held_back = self.held_back, held
            if was and not held:
                self.schedule()

    def end_again(self, ended: Session) -> bool:
        """A waiting session that has ended so, which the ledger had lost: False if it does not wait."""
        with self._lock:
            live = self._live.get(ended.id)
            if live is None or live.session.state != State.CREATED:
                return False
            self.move(ended.id, State.FINALIZED, **{name: getattr(ended, name) for name in OUTCOME})
            return True

    def outdo(self, id: str, revision: int) -> None:
        """Raise a session's revision above this one, which the server had been told before the ledger was lost."""
        with self._lock:
            live = self._live.get(id)
            session = live.session if live else self._final(id)[0]
            if session.revision <= revision:
                raised = self.ledger.raise_revision(session, revision + 1)
                if live:
                    live.session = raised

    def schedule(self) -> None:
        """Start all of the queue that may start now."""
        with self._lock:
            for id in self._claim():
                self.on_start(id)

    def _claim(self) -> Iterator[str]:
        """Claim for all of the queue that may start now, one after the other.

        Who gets no port lets the others pass, as nothing that they leave would help it, and keeps its place: it is
        asked again each time, and then before them.
        """
        if self.cordoned or self.held_back:
            return
        queue = waiting = [live for live in self._live.values() if live.session.state == State.CREATED]
        lacks: dict[str, str] = {}
        fewest, why = (
            sys.maxsize,
            "",
        )  # ports that somebody did not get: who wants as many is not tried
        while waiting:
            amounts = [plan.amount(live.session.request) for live in waiting]
            startable = claims.startable(amounts, self.free())
            without = len(lacks)
            for index in startable:
                session, amount = waiting[index].session, amounts[index]
                wanted = sum(not port for _, port in session.request.ports)
                try:
                    if wanted >= fewest:
                        raise Error("unavailable", why)
                    ports = self.ports.pick(session.id, session.request, self.live())
                except (Error, OSError) as error:
                    why = error.message if isinstance(error, Error) else f"no ports: {error.strerror}"
                    fewest, lacks[session.id] = min(fewest, wanted or fewest), why
                    continue
                gpus = claims.pick(amount.gpus, self.inventory.gpus, held(self.live()))
                claim = Claim(gpus, amount.cpus, amount.memory, ports)
                self.move(session.id, State.SCHEDULED, claim=claim, scheduled=datetime.now(UTC))
                yield session.id
            if len(lacks) == without:
                break
            waiting = [live for index, live in enumerate(waiting) if index not in startable]
        for live in queue:
            if live.lacks != (now := lacks.get(live.session.id, "")):
                live.lacks = now
                self._notify(live)

    def move(self, id: str, state: State | None = None, actor: str = "executor", **changes: object) -> Session:
        """Change a session: durable first, then visible, then told to its followers. Returns it as it is now.

        On a full disk one that holds its claim already goes on, and its end makes room: the ledger learns of it with
        the next change. Until then an executor that is killed finds it again by its sandbox.
        """
        with self._lock:
            live = self._live[id]
            old = live.session
            wanted = replace(old, state=state or old.state, **live.passed | changes)  # type: ignore[arg-type]
            try:
                live.session = self.ledger.move(old, wanted, actor)
            except Error as error:
                if error.code != "storage_full" or old.state not in LIVE or wanted.state == State.FINALIZED:
                    raise
                log.error("session %s: %s", id, error)
                live.session = wanted
            if live.session.state == State.FINALIZED:
                del self._live[id]
                self.ports.drop(self._live)
            if live.session.state in (State.EXITED, State.FINALIZED) or old.state == State.CREATED:
                self._notify_queue()
            self._notify(live)
            self.on_change()
            return live.session

    def passed(self, id: str, moment: str) -> None:
        """A moment of a session's start: `image_ready` or `made`.

        Written with its next change, because each write makes the way to a prompt longer; at once when it took so long
        that people look at it.
        """
        with self._lock:
            if live := self._live.get(id):
                now = datetime.now(UTC)
                live.passed[moment] = now
                if live.session.scheduled and (now - live.session.scheduled).total_seconds() > LONG:
                    self.move(id)

    def ended(
        self, id: str, exit_code: int | None, message: str = "", error: str = "", at: datetime | None = None
    ) -> None:
        """The main process is gone, or never came to be (then with an error's code): say so, and have it cleaned up.

        at: when, by default now.
        """
        with self._lock:
            live = self._live.get(id)
            if live is None or live.session.state not in (State.SCHEDULED, State.STARTED):
                return
            self.move(
                id, State.EXITED, exited=at or datetime.now(UTC), exit_code=exit_code, message=message, error=error
            )
            self.on_exit(id)

    def release(self, id: str) -> None:
        """Nothing is left of it: final, its claim free, the next of the queue started."""
        with self._lock:
            self.move(id, State.FINALIZED, finalized=datetime.now(UTC))
            self.schedule()

    def cancel(self, id: str, actor: str) -> bool:
        """Note that `actor` ends a session. True when that was all: it was still in the queue."""
        with self._lock:
            live = self._live.get(id)
            if live is None or live.session.state == State.EXITED:
                return True
            now = datetime.now(UTC)
            if live.session.state == State.CREATED:
                why = f"given up by {actor} while waiting"
                self.move(id, State.FINALIZED, actor, canceled=now, finalized=now, canceled_for=why, message=why)
                self.schedule()
                return True
            if live.session.canceled is None:
                self.move(id, None, actor, canceled=now, canceled_for=f"stopped by {actor}")
            return False

    @property
    def cordoned(self) -> str:
        """Why nothing new is started here, "" when it is."""
        return "; ".join(self._cordons.values())

    @property
    def drained(self) -> str:
        """That part of it which the machine has found out itself: sessions that do not end."""
        return "; ".join(reason for source, reason in self._cordons.items() if ids.is_ulid(source))

    @property
    def cordoning(self) -> set[str]:
        """The sessions that keep this node from starting anything new."""
        with self._lock:
            return {source for source in self._cordons if ids.is_ulid(source)}

    def cordon(self, source: str, reason: str) -> None:
        """Start nothing new while any source has a reason; the queue keeps its order. "" takes a source's back."""
        with self._lock:
            if self._cordons.get(source, "") == reason:
                return
            if reason:
                if source != "start":  # every start does
                    log.warning("cordoned: %s", reason)
                self._cordons[source] = reason
            else:
                del self._cordons[source]
            self._notify_queue()
            self.schedule()

    # -- following

    def follow(self, id: str, follower: Subscription) -> None:
        """Tell `follower` of a session until `leave`, and once at first."""
        with self._lock:
            if live := self._live.get(id):
                live.subscribers.add(follower)
            follower.notify()

    def leave(self, id: str, follower: Subscription) -> None:
        with self._lock:
            if live := self._live.get(id):
                live.subscribers.discard(follower)
            follower.close()

    def progress(self, id: str, progress: Progress) -> None:
        """How far a session's image is. Raises Error limit, at the first word of one too many for its account."""
        with self._lock:
            if live := self._live.get(id):
                if live.progress is None:
                    pulling = [one.session for one in self._live.values() if one.pulls()]
                    own = [session for session in pulling if session.account == live.session.account]
                    admission.may_pull(self.limits, own)
                live.progress = progress
                self._notify(live)

    def notice(self, id: str, about: str, text: str) -> None:
        """What a session's author should know now about something, "" for nothing more."""
        with self._lock:
            if (live := self._live.get(id)) and live.notices.get(about, "") != text:
                live.notices.pop(about, None)
                if text:
                    live.notices[about] = text
                self._notify(live)

    def offer(self, id: str, attach: Callable[[], Terminal], start: Callable[[tuple[int, int]], None]) -> None:
        """Start a sandbox, with the size of the first follower who wants its terminal, and give them that.

        Connected before, so that no output is lost; given after, since a start whose executor is killed may be begun
        again, with other streams.
        """
        with self._lock:
            live = self._live[id]
            taker = next((s for s in live.subscribers if s.wants_terminal and s.terminal is None), None)
            size = live.session.request.size
        if taker is None:
            start(size)
            return
        terminal = attach()
        try:
            start(taker.size or size)
            with self._lock:
                if taker in live.subscribers:
                    taker.terminal, live.offered = terminal, True
                    taker.notify()
                    return
        except BaseException:
            os.close(terminal.fd)
            raise
        os.close(terminal.fd)  # it left meanwhile

    def _notify(self, live: Live) -> None:
        for subscription in live.subscribers:
            subscription.notify()

    def _notify_queue(self) -> None:
        for live in self._live.values():
            if live.session.state == State.CREATED:
                self._notify(live)
