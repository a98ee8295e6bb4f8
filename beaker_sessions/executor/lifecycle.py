"""What takes time in a session's life: starting its sandbox, seeing it end, cleaning up, and finding all of it again.

Acts on `Sessions` through its methods and on the machine through the driver. Owns the threads of both. The order is
always: intent in the ledger, then the act, then the outcome in the ledger; so whatever is interrupted is found half-
done by `reconcile` and finished or undone. Longer than 400 lines, as one table says who acts on a session: `_busy`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from .. import wire
from ..errors import Error
from ..model import Claim, Identity, Request, Session, State
from ..sandbox import LABEL_OWNER, Found, Mount, Progress, Sandboxes, Spec, Status, subordinate
from ..settings import ExecutorSettings
from . import admission, credentials, disk, forwarding, inventory, plan
from .homes import home
from .incident import incident
from .inside import Inside
from .loop import Workers
from .places import Places
from .ports import Sockets
from .publishing import Publisher
from .rundir import TARGET
from .sessions import Live, Sessions

log = logging.getLogger(__name__)

RESTARTED = "the machine was restarted"
REMOVED = "somebody else removed its container"
SIGNALLED = 128  # an exit code above it says that a signal ended the process: which one is what is above
GONE = 20.0  # seconds after the grace of a stop in which nothing is left of a session, when all end at once
OUTPUT_KEPT = 1 << 20  # bytes of its output that are kept for `session logs` after the end
WHOLE = 64 << 20  # bytes: more than any driver keeps
UNSEEN = 300.0  # seconds after the end in which whoever follows a session from its start must have come back
THREADS, EACH = 48, 8  # that start sessions, and as many that clean up; so many for one account
REST = 10.0  # seconds after which one that has nothing to do ends
STUCK = 30.0  # seconds after which a sandbox that cannot be removed cordons the node
RECONCILE_EVERY = 10.0


class Lifecycle:
    """Wires itself to `sessions`; `run` starts its threads."""

    def __init__(
        self, sessions: Sessions, sandboxes: Sandboxes, settings: ExecutorSettings, inside: Inside, owner: str
    ) -> None:
        self.inside = inside
        self.sessions, self.sandboxes, self.settings, self.owner = sessions, sandboxes, settings, owner
        self.disk = disk.limit(settings)
        self.output = Path(settings.storage_path, "executor", "output")
        self.output.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ready = threading.Event()  # the first reconcile is done: what runs here is known
        self._busy: set[tuple[str, str]] = set()  # what a thread of ours does right now, or will, and to which session
        self._unbegun: set[str] = set()  # sessions whose start waits for a worker
        self._found = {session.id for session in sessions.live()}  # of an executor before
        self._lock = threading.Lock()
        self._reconciling = threading.Lock()
        self._boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        restarted = (sessions.ledger.fact("boot") or self._boot) != self._boot
        self._alive = Path(settings.storage_path, "executor", "alive")  # as new as the last look at the sessions
        self._last_look = _modified(self._alive)
        self._publisher = Publisher(sessions, sandboxes)
        self._cut_off = (
            {session.id for session in sessions.live()} if restarted else set()
        )  # by a restart of the machine
        sessions.cordon("start", "the executor is starting")
        # Under the lock of `sessions`: one that is seen to be scheduled is already noted as busy.
        sessions.on_start = lambda id: self._spawn("start", id, partial(self._start, number=self._places.number()))
        sessions.on_exit = lambda id: self._spawn("clean up", id, self._clean_up)
        self._workers = {name: Workers(name, THREADS, EACH, rest=REST) for name in ("start", "clean up")}
        self._places = Places(max(2, len(os.sched_getaffinity(0))))

    def run(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        threading.Thread(target=self._tick, name="tick", daemon=True).start()

    def _spawn(self, what: str, id: str, act: Callable[[str], None]) -> None:
        """Do something to a session in a thread, unless one does this already, or something else of this name.

        Whatever was known when it was asked for, `act` looks anew: nobody else does this to the session meanwhile.
        Starts and clean-ups wait for workers, of which each account has a share; an end, which waits for what runs,
        has a thread of its own.
        """
        key = what, id
        live = self.sessions.entry(id)

        def guarded() -> None:
            try:
                if what == "start":
                    with self._lock:
                        if id not in self._unbegun:
                            return  # it was stopped meanwhile
                        self._unbegun.remove(id)
                act(id)
            except Error as error:  # the next reconcile takes it up again
                log.warning("session %s: %s failed: %s", id, what, error)
            except Exception:
                log.exception("session %s: %s failed", id, what)
            finally:
                with self._lock:
                    self._busy.discard(key)

        with self._lock:
            if key in self._busy:
                return
            self._busy.add(key)
            if what == "start":
                self._unbegun.add(id)
        try:
            if what in self._workers:
                self._workers[what].submit(live.session.account if live else "", guarded)
                return
            threading.Thread(target=guarded, name=f"{what} {id}", daemon=True).start()
        except RuntimeError as error:  # the machine has no thread left; the next reconcile takes it up again
            log.error("session %s: %s has to wait: %s", id, what, error)
            with self._lock:
                self._busy.discard(key)

    # -- starting

    def _start(self, id: str, number: int) -> None:
        live = self.sessions.entry(id)
        if live is None or live.session.state != State.SCHEDULED:
            return
        if self._tried(id, live, number, self._make):
            self._began(id, live, time.clock_gettime(time.CLOCK_BOOTTIME), datetime.now(UTC))

    def _resume(self, id: str, number: int) -> None:
        """A start that was interrupted: go on where it was, or begin again if what was made has ended by itself."""
        live = self.sessions.entry(id)
        if live is None or live.session.state != State.SCHEDULED:
            return
        found = self.sandboxes.find(id)
        if found and found.status == Status.CREATED and id not in self._cut_off:
            if self._tried(id, live, number, self._finish):
                self._began(id, live, time.clock_gettime(time.CLOCK_BOOTTIME), datetime.now(UTC))
        elif found is None or found.started is None:
            self.sandboxes.remove(id)
            self._start(id, number)
        else:
            if found.status == Status.RUNNING:
                self.sandboxes.start(id, live.session.request.size if live.session.request.tty else None)
            live.changed = True  # it may have ended before anybody watched
            self._began(id, live, _started(found.pid), found.started)

    def _tried(self, id: str, live: Live, number: int, act: Callable[[str, Live, int], None]) -> bool:
        """Do a part of a start. What it raises ends the session."""
        try:
            act(id, live, number)
        except Exception as unexpected:
            error = unexpected if isinstance(unexpected, Error) else incident(log)
            log.warning("session %s could not start: %s", id, error)
            why = f"{error.message}; {error.hint}" if error.hint else error.message
            canceled = live.session.canceled_for
            self.sessions.ended(id, None, canceled or why, "" if canceled else error.code)
            return False
        return True

    def _began(self, id: str, live: Live, since: float, started: datetime) -> None:
        live.since = since
        self.sessions.move(id, State.STARTED, started=started)
        if live.session.canceled:
            self._spawn("end", id, self._end)
        if live.changed:
            self._examine(id)

    def _make(self, id: str, live: Live, number: int) -> None:
        session, identity, request = live.session, live.identity, live.session.request
        assert request.image  # `plan.defaults` has filled it in
        admission.check_person(identity)  # one of an earlier version may wait in the queue; ids are the driver's matter
        login = partial(credentials.find, identity)
        going = partial(self._going, id)
        image = self.sandboxes.image(request.image, request.pull, lambda p: self._progress(id, p), login, going)
        self.sessions.passed(id, "image_ready")
        rundir, files = self.inside.prepare(id, request, identity)
        own = [Mount(str(rundir), TARGET, read_only=True)]
        own += [Mount(str(f), path, read_only=True) for f, (_, path) in zip(files, request.secret_mounts, strict=True)]
        with ExitStack() as pins:
            claim, sockets = self._publisher.bind(id, session, pins)
            session = replace(session, claim=claim)
            mounts = [*self._mounts(request, identity, pins), *own]  # the last that may have to be waited for
            spec: Spec = plan.spec(
                id, request, claim, identity, image, mounts,
                capacity=self.sessions.capacity, node=self.node(), owner=self.owner, job=wire.job(session),
                disk=self.disk,
            )  # fmt: skip
            with self._places.held(number):
                self.sandboxes.create(spec)
                self.sessions.passed(id, "made")
                self._let_go(id, request, sockets)

    def _finish(self, id: str, live: Live, number: int) -> None:
        """Start what another executor has made."""
        with ExitStack() as pins:
            _, sockets = self._publisher.bind(id, live.session, pins)
            with self._places.held(number):
                self._let_go(id, live.session.request, sockets)

    def _let_go(self, id: str, request: Request, sockets: Sockets) -> None:
        self.sessions.offer(
            id,
            lambda: self.sandboxes.attach(id, replay=False),
            lambda size: self.sandboxes.start(id, size if request.tty else None),
        )
        if sockets:
            self._publisher.forward(id, sockets)

    def _going(self, id: str) -> None:
        live = self.sessions.entry(id)
        if live and live.session.canceled:
            raise Error("conflict", live.session.canceled_for)  # ends the pull

    def _progress(self, id: str, progress: Progress) -> None:
        self._going(id)
        self.sessions.progress(id, progress)

    def node(self) -> Mapping[str, str]:
        return {"id": self.sessions.ledger.fact("node") or "", "hostname": self.sessions.inventory.hostname}

    def ranges(self) -> subordinate.Ranges:
        """Everybody's subordinate ids, where the sessions of this node have some of them."""
        return subordinate.everybody() if self.sandboxes.root else subordinate.NONE

    def _mounts(self, request: Request, identity: Identity, pins: ExitStack) -> list[Mount]:
        if request.bare:
            return []
        mounts = [Mount(self._pinned(home(identity, make=bool(self.settings.session_home)), pins), identity.home)]
        for path in self.settings.mount_paths:
            try:
                mounts.append(Mount(self._pinned(inventory.pin(path, identity), pins), path))
            except FileNotFoundError:
                continue  # "`/net` when the node has it"
            except OSError as error:
                raise Error(
                    "forbidden", f"{identity.name} may not enter {path}: {error.strerror}", "ask the administrator"
                ) from error
        return mounts

    @staticmethod
    def _pinned(descriptor: int, pins: ExitStack) -> str:
        pins.callback(os.close, descriptor)
        return f"/proc/{os.getpid()}/fd/{descriptor}"

    # -- ending

    def stop(self, id: str, actor: str) -> None:
        """End a session, wherever it is in its life, without waiting for it. What fails `reconcile` takes up again."""
        if self.sessions.cancel(id, actor):
            return
        with self._lock:
            waits = id in self._unbegun
            self._unbegun.discard(id)
        if waits:
            self.sessions.ended(id, None, f"stopped by {actor} before it was started")
        else:
            self._spawn("end", id, self._end)

    def _end(self, id: str) -> None:
        """End a session's main process. If it does not, the node is cordoned, and its GPUs are not given away."""
        live = self.sessions.entry(id)
        if live and live.session.state == State.STARTED:
            try:
                self.sandboxes.stop(id, self.settings.stop_grace)
            except Error as error:
                if error.code != "not_found":  # it ended just now
                    log.warning("session %s does not end: %s", id, error)
                    self.sessions.cordon(id, f"session {id} does not end: {error.message}")

    def end_all(self, actor: str) -> list[str]:
        """End all sessions, tell their terminals before, and start none any more: those that are left when it is over.

        The queue stays, for when the machine is back.
        """
        self.sessions.cordon("shutdown", "all sessions end, as the machine does, or its administrator wants")
        deadline = time.monotonic() + self.settings.stop_grace + GONE
        what = f"this machine ends all its sessions: save your work, {self.settings.stop_grace:g} s are left"
        told: set[str] = set()
        while True:
            live = [session.id for session in self.sessions.live() if session.state != State.CREATED]
            for id in set(live) - told:
                told.add(id)
                try:
                    self.sessions.notice(id, "shutdown", what)
                    self.stop(id, actor)
                except Error as error:  # the disk is full: the others are told all the same
                    log.warning("session %s: %s", id, error)
            if not live or time.monotonic() > deadline:
                return live
            time.sleep(0.1)

    def logs(self, session: Session, limit: int = OUTPUT_KEPT) -> bytes:
        """The latest output of a session, live or ended."""
        if session.state in (State.STARTED, State.EXITED):
            with suppress(Error):  # removed just now: what was kept is on the disk
                return self.sandboxes.logs(session.id, limit)
        try:
            return (self.output / session.id).read_bytes()[-limit:]
        except FileNotFoundError:
            return b""

    def unseen(self, session: Session) -> bytes:
        """All output of a session that has ended, for who was given nothing of it: framed, unless it has a terminal."""
        for _ in range(2):  # the file is written before the sandbox goes
            with suppress(FileNotFoundError):
                return self._unseen(session.id).read_bytes()
            with suppress(Error):
                if output := self.sandboxes.logs(session.id, WHOLE, framed=not session.request.tty):
                    return output
        return b""

    def _unseen(self, id: str) -> Path:
        """What is kept of the output of a session for who comes back after its end, as this executor may have just been
        started, and was not there to pass its streams on."""
        return self.output / f"{id}.unseen"

    def _examine(self, id: str) -> None:
        """Look whether a session's main process has ended."""
        live = self.sessions.entry(id)
        if live and live.session.state == State.SCHEDULED:
            live.changed = True  # `_began` looks again, once it has said that it ran
            live = self.sessions.entry(id)
        if live and live.session.state == State.STARTED:
            found = self.sandboxes.find(id)
            if found and found.status == Status.EXITED:
                end = self._end_of(live.session, found)
                self.sessions.ended(id, found.exit_code, self._farewell(found, live.session), at=end)

    def _farewell(self, found: Found, session: Session) -> str:
        """Why a session ended, as far as its exit code does not say it."""
        if found.oom:
            return "out of memory: a process of this session was killed; ask for more with --memory"
        if session.id in self._cut_off and (found.exit_code or 0) > SIGNALLED:
            return RESTARTED
        return session.canceled_for or found.why

    def _end_of(self, session: Session, found: Found | None) -> datetime:
        """When a session ended. What the machine took with it was last seen to run before."""
        now = datetime.now(UTC)
        end = (found.finished if found else None) or now
        if session.id in self._cut_off and self._last_look:
            end = min(end, self._last_look)
        return max(session.started or session.created or now, min(end, now))

    def _clean_up(self, id: str) -> None:
        live = self.sessions.entry(id)
        if live is None or live.session.state != State.EXITED or ("remove", id) in self._busy:
            return
        output = unseen = b""
        try:
            output = self.sandboxes.logs(id, OUTPUT_KEPT)
            if output and not live.offered and id in self._found:  # whoever follows it may come back
                unseen = self.unseen(live.session)
        except Exception as error:
            if not isinstance(error, Error) or error.code != "not_found":  # it never came to be
                log.warning("the output of session %s could not be kept: %s", id, error)
        again = None if self._keep(id, output, unseen) else (output, unseen)
        if self._removed(id, live, time.monotonic()):
            self._release(id, again)
        else:  # what cannot be killed takes nobody's turn
            self._spawn("remove", id, lambda id: self._remove(id, again))

    def _remove(self, id: str, again: tuple[bytes, bytes] | None) -> None:
        """Remove what is left of a session, however long the kernel keeps it."""
        live, since = self.sessions.entry(id), time.monotonic()
        while live and not self._removed(id, live, since):
            time.sleep(2)
        self._release(id, again)

    def _removed(self, id: str, live: Live, since: float) -> bool:
        try:
            self.sandboxes.remove(id)
            if live.session.claim and live.session.claim.ports:
                forwarding.end(id)
        except Exception as unexpected:
            problem = unexpected if isinstance(unexpected, Error) else incident(log)
            log.warning("session %s cannot be removed: %s", id, problem)
            if time.monotonic() - since > STUCK:
                self.sessions.cordon(id, f"session {id} cannot be removed: {problem.message}")
            return False
        return True

    def _release(self, id: str, again: tuple[bytes, bytes] | None) -> None:
        if again:
            self._keep(id, *again)  # the disk was full, and has the room of this session now
        self.inside.close(id)
        self.sessions.cordon(id, "")
        self.sessions.release(id)

    def _keep(self, id: str, output: bytes, unseen: bytes) -> bool:
        """Write a session's output where `logs` and `unseen` find it: all, or nothing and False."""
        files = {self.output / id: output, self._unseen(id): unseen}
        try:
            for path, data in files.items():
                if data:
                    path.write_bytes(data)
        except OSError as error:
            log.warning("the output of session %s could not be kept: %s", id, error)
            for path in files:
                path.unlink(missing_ok=True)
            return False
        return True

    # -- watching

    def _watch(self) -> None:
        trouble = ""
        while True:
            try:
                for id in self.sandboxes.watch():
                    self._examine(id) if id else self.reconcile()
                    trouble = ""
            except Error as error:
                if str(error) != trouble:
                    trouble = str(error)
                    log.warning("the container engine is not there: %s", error)
            except Exception:
                log.exception("watching failed")
            time.sleep(0.5)

    def _tick(self) -> None:
        last, weighed, again = time.monotonic(), -1.0, 0.0
        while True:
            time.sleep(1)
            try:
                self._end_overdue()
                if time.monotonic() - last > RECONCILE_EVERY:
                    last = time.monotonic()
                    self.reconcile()
                    self._forget_unseen()
                    self.sessions.ledger.keep_room()
                    self._guard()
                claimed = self.sessions.capacity.cpus - self.sessions.free().cpus
                if claimed != weighed and time.monotonic() >= again:
                    # Within a second of the claim, and not on the way to a prompt. It may take long, and fail.
                    again = time.monotonic() + RECONCILE_EVERY
                    self.sandboxes.weigh(claimed)
                    weighed, again = claimed, 0.0
            except Error as error:
                log.warning("cannot look after the sessions: %s", error)
            except Exception:
                log.exception("looking after the sessions failed")

    def _forget_unseen(self) -> None:
        for path in self.output.glob("*.unseen"):
            if time.time() - path.stat().st_mtime > UNSEEN:
                path.unlink()

    def _guard(self) -> None:
        if any(s.state == State.STARTED and not s.request.host_network for s in self.sessions.live()):
            self.sandboxes.guard()

    def _end_overdue(self) -> None:
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        for session in self.sessions.live():
            live, limit = self.sessions.entry(session.id), session.request.timeout
            overdue = live and limit and live.since is not None and now - live.since > limit
            if overdue and session.state == State.STARTED and not session.canceled:
                self.stop(session.id, "its time limit")

    def reconcile(self) -> None:
        """Compare the ledger with what exists, and mend each difference. Safe to call at any time."""
        with self._reconciling:
            self._reconcile()

    def _reconcile(self) -> None:
        """What is listed says where to look, and no more: sessions start and end meanwhile. Each act looks anew."""
        known = self.sessions.live()  # before the list: what ran then must be in it
        exists = {found.id: found for found in self.sandboxes.list()}
        for id, found in exists.items():  # what runs holds what it claims, before anything is begun anew
            self._one(id, self._known, found)
        for session in known:
            self._one(session.id, self._compare, exists.get(session.id))
        published = [s for s in self.sessions.live() if s.state == State.STARTED and s.claim and s.claim.ports]
        self._publisher.forward_again(published)
        self.sessions.schedule()  # what a session waits for may be another program's, which tells nobody of its end
        for id in self.sessions.cordoning - {*exists, *(session.id for session in self.sessions.live())}:
            self.sessions.cordon(id, "")  # somebody removed it by hand
        with suppress(OSError):
            self._alive.touch()
        self.inside.resume(lambda: [session.id for session in self.sessions.live()])
        if not self.ready.is_set():
            self.sessions.ledger.note("boot", self._boot)
            self.ready.set()
            self.sessions.cordon("start", "")

    def _one(self, id: str, act: Callable[[str, Any], None], found: Found | None) -> None:
        """Look after one session. What nobody expected keeps the others from nothing but the GPUs that it may hold."""
        source = f"looking after {id}"
        try:
            act(id, found)
            self.sessions.cordon(source, "")
        except Error:  # of the engine, or the disk
            raise
        except Exception:
            log.exception("session %s cannot be looked after", id)
            self.sessions.cordon(source, f"session {id} cannot be looked after: see the executor's log")

    def _known(self, id: str, found: Found) -> None:
        """Have the ledger know a sandbox that exists."""
        if (live := self.sessions.entry(id)) is None:
            self._adopt(id)
        elif live.session.state == State.CREATED:
            self._recall(found)

    def _compare(self, id: str, listed: Found | None) -> None:
        """Mend what differs between a session and its sandbox as it was listed."""
        live = self.sessions.entry(id)
        if live is None:
            return
        session = live.session
        if session.state == State.SCHEDULED:
            self._spawn("start", id, partial(self._resume, number=self._places.number()))
        elif session.state == State.EXITED:
            self._spawn("clean up", id, self._clean_up)
        elif session.state == State.STARTED:
            if listed is None:
                if self.sandboxes.find(id) is None:
                    why = RESTARTED if id in self._cut_off else REMOVED
                    self.sessions.ended(id, None, why, at=self._end_of(session, None))
            elif listed.status == Status.EXITED:
                self._examine(id)
            elif session.canceled:
                self._spawn("end", id, self._end)  # an executor was killed, or an engine away, before it ended
            elif live.since is None:
                live.since = _started(listed.pid)

    def _recall(self, found: Found) -> None:
        """A session that waits, says the ledger, and has a sandbox: the ledger's latest changes were lost."""
        claim = None
        try:
            claim = wire.session(json.loads(found.labels[plan.LABEL_JOB])).claim
            if not self.sessions.recall(found.id, claim):
                return
        except (KeyError, ValueError) as error:
            self.sessions.cordon(found.id, f"what session {found.id} holds is not known: {error}")
            return
        except Error as error:
            self._refused(found.id, claim, error)
            return
        log.warning("session %s runs, and the ledger had it in the queue", found.id)
        self.sessions.cordon(found.id, "")
        self._spawn("start", found.id, partial(self._resume, number=self._places.number()))

    def _adopt(self, id: str) -> None:
        """A sandbox that the ledger does not know: lost with it, or the remains of one that ended."""
        known, found = self.sessions.ledger.get(id), self.sandboxes.find(id)
        if found is None or found.labels.get(LABEL_OWNER) != self.owner:
            return
        if known and known[0].state == State.FINALIZED:
            self.sandboxes.remove(id)
        if known:
            return  # made since we looked
        try:
            session = wire.session(json.loads(found.labels[plan.LABEL_JOB]))
            identity = inventory.unix_user(int(found.labels[plan.LABEL_UID]), self.settings.session_home)
        except (KeyError, ValueError, Error) as error:
            if found.status == Status.EXITED:
                log.error("what is left of session %s has unreadable labels (%s), and is removed", id, error)
                self.sandboxes.remove(id)
                self.sessions.cordon(id, "")
                return
            # Whose GPUs it holds is not known, so no GPU is free for sure.
            how = f"; to end it: kill -9 {found.pid}" if found.pid else ""
            self.sessions.cordon(id, f"session {id} runs and has unreadable labels ({error}){how}")
            return
        state = State.STARTED if found.status == Status.RUNNING else State.SCHEDULED
        try:
            started = found.started if state == State.STARTED else None
            self.sessions.adopt(replace(session, state=state, started=started), identity)
        except Error as error:
            self._refused(id, session.claim, error)
            return
        log.warning("session %s was found by its container; the ledger did not know it", id)
        self.sessions.cordon(id, "")
        self._spawn("start", id, partial(self._resume, number=self._places.number()))

    def _refused(self, id: str, claim: Claim | None, error: Error) -> None:
        """The disk is full, or the ledger is older than what runs, and has somebody else hold what that claims.

        Who does not run is ended: it would be given what is taken. The next reconcile takes up what runs.
        """
        self.sessions.cordon(id, f"the ledger does not take session {id}, which runs: {error.message}")
        gpus = set(claim.gpus if claim else ())
        for other in self.sessions.live():
            if other.state == State.SCHEDULED and other.claim and gpus.intersection(other.claim.gpus):
                with self._lock:
                    starts = ("start", other.id) in self._busy
                if not starts and self.sandboxes.find(other.id) is None:
                    self.sessions.ended(other.id, None, f"its GPUs are those of session {id}", "conflict")


def _modified(path: Path) -> datetime | None:
    """None for a file that is not there."""
    with suppress(OSError):
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)
    return None


def _started(pid: int) -> float:
    """When a process started, in seconds of CLOCK_BOOTTIME. Source: proc(5), field 22 of /proc/pid/stat."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")
