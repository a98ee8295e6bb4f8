"""What takes time in a session's life: starting its sandbox, seeing it end, cleaning up, and finding all of it again.

Acts on `Sessions` through its methods and on the machine through the driver. Owns the threads of both. The order is
always: intent in the ledger, then the act, then the outcome in the ledger; so whatever is interrupted is found half-
done by `reconcile` and finished or undone.
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

from .. import wire
from ..errors import Error
from ..model import Identity, Request, Session, State
from ..sandbox import LABEL_OWNER, Found, Mount, Progress, Sandboxes, Spec, Status, subordinate
from ..settings import ExecutorSettings
from . import admission, credentials, disk, forwarding, inventory, plan
from .homes import home
from .incident import incident
from .inside import Inside
from .publishing import Publisher
from .rundir import TARGET
from .sessions import Sessions

log = logging.getLogger(__name__)

RESTARTED = "the machine was restarted"
SIGNALLED = 128  # an exit code above it says that a signal ended the process: which one is what is above
GONE = 20.0  # seconds after the grace of a stop in which nothing is left of a session, when all end at once
OUTPUT_KEPT = 1 << 20  # bytes of its output that are kept for `session logs` after the end
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
        self._busy: set[str] = set()  # sessions that a thread of ours starts or cleans up right now
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
        sessions.on_start = lambda id: self._spawn(id, self._start)
        sessions.on_exit = lambda id: self._spawn(id, self._clean_up)

    def run(self) -> None:
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        threading.Thread(target=self._tick, name="tick", daemon=True).start()

    def _spawn(self, id: str, act: Callable[[str], None]) -> None:
        def guarded() -> None:
            try:
                act(id)
            except Exception:
                log.exception("session %s: %s failed", id, act.__name__)  # the next reconcile takes it up again
            finally:
                with self._lock:
                    self._busy.discard(f"{act.__name__} {id}")

        with self._lock:
            if f"{act.__name__} {id}" in self._busy:
                return
            self._busy.add(f"{act.__name__} {id}")
        try:
            threading.Thread(target=guarded, name=f"{act.__name__} {id}", daemon=True).start()
        except RuntimeError as error:  # the machine has no thread left; the next reconcile takes it up again
            log.error("session %s: %s has to wait: %s", id, act.__name__, error)
            with self._lock:
                self._busy.discard(f"{act.__name__} {id}")

    # -- starting

    def _start(self, id: str) -> None:
        live = self.sessions.entry(id)
        if live is None or live.session.state != State.SCHEDULED:
            return
        try:
            self._make(id, live.session, live.identity)
        except Exception as unexpected:
            error = unexpected if isinstance(unexpected, Error) else incident(log)
            log.warning("session %s could not start: %s", id, error)
            why = f"{error.message}; {error.hint}" if error.hint else error.message
            canceled = live.session.canceled_for
            self.sessions.ended(id, None, canceled or why, "" if canceled else error.code)
            return
        live.since = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.sessions.move(id, State.STARTED, started=datetime.now(UTC))
        if live.session.canceled:
            self._spawn(id, self._end)
        if live.exit_seen:
            self._examine({id})

    def _make(self, id: str, session: Session, identity: Identity) -> None:
        request = session.request
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
            spec: Spec = plan.spec(
                id, request, claim, identity, image, [*self._mounts(request, identity, pins), *own],
                capacity=self.sessions.capacity, node=self.node(), owner=self.owner, job=wire.job(session),
                disk=self.disk,
            )  # fmt: skip
            self.sandboxes.create(spec)
            self.sessions.passed(id, "made")
            size = self.sessions.offer(id, lambda: self.sandboxes.attach(id, replay=False))
            self.sandboxes.start(id, size if request.tty else None)
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
        if not self.sessions.cancel(id, actor):
            self._spawn(id, self._end)

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
                self.sessions.notice(id, "shutdown", what)
                self.stop(id, actor)
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

    def _examine(self, ids: set[str]) -> None:
        """Look whether these sessions' main processes have ended."""
        for found in self.sandboxes.list():
            live = self.sessions.entry(found.id)
            if found.id not in ids or live is None or found.status != Status.EXITED:
                continue
            if live.session.state == State.SCHEDULED:
                live.exit_seen = True  # `_start` has not yet said that it ran
                live = self.sessions.entry(found.id)
                if live is None or live.session.state != State.STARTED:
                    continue
            end = self._end_of(live.session, found)
            self.sessions.ended(found.id, found.exit_code, self._farewell(found, live.session), at=end)

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
        try:
            output = self.sandboxes.logs(id, OUTPUT_KEPT)
            if output:
                (self.output / id).write_bytes(output)
        except Exception as error:
            if not isinstance(error, Error) or error.code != "not_found":  # it never came to be
                log.warning("the output of session %s could not be kept: %s", id, error)
        since = time.monotonic()
        while True:
            try:
                self.sandboxes.remove(id)
                live = self.sessions.entry(id)
                if live and live.session.claim and live.session.claim.ports:
                    forwarding.end(id)
                break
            except Exception as unexpected:
                problem = unexpected if isinstance(unexpected, Error) else incident(log)
                log.warning("session %s cannot be removed: %s", id, problem)
                if time.monotonic() - since > STUCK:
                    self.sessions.cordon(id, f"session {id} cannot be removed: {problem.message}")
                time.sleep(2)
        self.inside.close(id)
        self.sessions.cordon(id, "")
        self.sessions.release(id)

    # -- watching

    def _watch(self) -> None:
        trouble = ""
        while True:
            try:
                for id in self.sandboxes.watch():
                    self._examine({id}) if id else self.reconcile()
                    trouble = ""
            except Error as error:
                if str(error) != trouble:
                    trouble = str(error)
                    log.warning("the container engine is not there: %s", error)
            except Exception:
                log.exception("watching failed")
            time.sleep(0.5)

    def _tick(self) -> None:
        last, weighed = time.monotonic(), -1.0
        while True:
            time.sleep(1)
            try:
                self._end_overdue()
                claimed = self.sessions.capacity.cpus - self.sessions.free().cpus
                if claimed != weighed:  # within a second of the claim, and not on the way to a prompt
                    weighed = claimed
                    self.sandboxes.weigh(claimed)
                if time.monotonic() - last > RECONCILE_EVERY:
                    last = time.monotonic()
                    self.reconcile()
                    self._guard()
            except Error as error:
                log.warning("cannot look after the sessions: %s", error)
            except Exception:
                log.exception("looking after the sessions failed")

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
        known = self.sessions.live()  # before the list: what ran then must be in it
        exists = {found.id: found for found in self.sandboxes.list()}
        published = []
        for session in known:
            found = exists.pop(session.id, None)
            live = self.sessions.entry(session.id)
            if live is None or session.state == State.CREATED:
                continue
            if session.state == State.SCHEDULED:
                self._resume(session.id, found)
            elif session.state == State.STARTED and found is None:
                why = (
                    "the machine was restarted"
                    if session.id in self._cut_off
                    else "somebody else removed its container"
                )
                self.sessions.ended(session.id, None, why, at=self._end_of(session, None))
            elif session.state == State.STARTED and found and found.status == Status.EXITED:
                self.sessions.ended(
                    session.id, found.exit_code, self._farewell(found, session), at=self._end_of(session, found)
                )
            elif session.state == State.STARTED and session.canceled:
                self._spawn(session.id, self._end)  # an executor was killed, or an engine away, before it ended
            elif session.state == State.STARTED and found and live.since is None:
                live.since = _started(found.pid)
            elif session.state == State.EXITED:
                self._spawn(session.id, self._clean_up)
            if session.state == State.STARTED and session.claim and session.claim.ports:
                published.append(session)
        self._publisher.forward_again(published)
        self.sessions.schedule()  # what a session waits for may be another program's, which tells nobody of its end
        for found in exists.values():
            self._adopt(found)
        self._alive.touch()
        self.inside.resume(lambda: [session.id for session in self.sessions.live()])
        if not self.ready.is_set():
            self.sessions.ledger.fact("boot", self._boot)
            self.ready.set()
            self.sessions.cordon("start", "")

    def _resume(self, id: str, found: Found | None) -> None:
        """A start that was interrupted: finish it if the main process runs, else begin again."""
        if f"_start {id}" in self._busy:
            return
        if found and found.status == Status.CREATED:
            self.sandboxes.remove(id)  # its pinned mounts died with the executor that made it
        if found is None or found.status == Status.CREATED:
            self._spawn(id, self._start)
            return
        live = self.sessions.entry(id)
        if live:
            if found.status == Status.RUNNING:
                self.sandboxes.start(id, live.session.request.size if live.session.request.tty else None)
                live.since = _started(found.pid)
            self.sessions.move(id, State.STARTED, started=found.started or datetime.now(UTC))
            self._examine({id})

    def _adopt(self, found: Found) -> None:
        """A sandbox that the ledger does not know: lost with it, or the remains of one that ended."""
        if found.labels.get(LABEL_OWNER) != self.owner:
            return
        known = self.sessions.ledger.get(found.id)
        if known and known[0].state == State.FINALIZED:
            self.sandboxes.remove(found.id)
        if known:
            return  # made since we looked
        try:
            session = wire.session(json.loads(found.labels[plan.LABEL_JOB]))
            identity = inventory.unix_user(int(found.labels[plan.LABEL_UID]), self.settings.session_home)
        except (KeyError, ValueError, Error) as error:
            # Whose GPUs it holds is not known, so no GPU is free for sure.
            why = f"the container of session {found.id} has unreadable labels ({error}); remove it by hand"
            self.sessions.cordon(found.id, why)
            return
        log.warning("session %s was found by its container; the ledger did not know it", found.id)
        state = State.STARTED if found.status == Status.RUNNING else State.SCHEDULED
        self.sessions.adopt(replace(session, state=state, started=found.started), identity)
        if found.status == Status.CREATED:
            self._resume(found.id, found)
        elif found.status == Status.EXITED:
            self.sessions.ended(found.id, found.exit_code, self._farewell(found, session))


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
