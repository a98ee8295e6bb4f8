"""Conversations that last: following a session through its life, and a second process in it.

Each blocks its caller's thread, woken by news, by what the caller says, and often enough to notice a revoked token.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

from .. import wire
from ..errors import Error
from ..model import LIVE, Claim, Identity, Request, Session, State
from ..sandbox import Terminal
from . import plan
from .access import FRESH
from .caller import Caller, Held
from .lifecycle import Lifecycle
from .sessions import Subscription, View

FROZEN = 10.0  # seconds in which a command line must answer, lest what it does not read stops the session,
SILENT = 2.0  # and when somebody attaches
AWAIT = 0.2  # seconds between looks at a process of which no terminal says that it has ended

ROOT = Identity("root", 0, 0, "/root", {0: "root"})


class Following:
    """recheck(token) raises Error unauthorized once a token is revoked. nodes(gpus): other machines that have them
    free.
    """

    def __init__(
        self,
        lifecycle: Lifecycle,
        recheck: Callable[[str], object],
        nodes: Callable[[int], list[str]],
        job: Callable[[View], dict],
    ) -> None:
        self.lifecycle, self.recheck, self.nodes, self.job = lifecycle, recheck, nodes, job
        self.sessions, self.sandboxes = lifecycle.sessions, lifecycle.sandboxes
        self._held: set[tuple[str, Held]] = set()  # the terminals of main processes that callers use, by session

    def session(
        self,
        caller: Caller,
        id: str,
        *,
        terminal: bool,
        size: tuple[int, int] | None,
        replay: bool = True,
        brief: bool = False,
    ) -> None:
        """Tell `caller` of a session until it has ended, or (brief) until it runs or waits."""
        said: dict[str, dict] = {}
        tty = self.sessions.view(id).session.request.tty
        with self.sessions.follow(id, terminal, size) as news, self._holding(caller, id) as held:
            for ready in self._turns(caller, held, news.fd):
                if tty:
                    held.ask()
                if held.is_cut or held.silent(FROZEN):
                    held.cut()
                    what = f"this terminal of session {id} took no output, and the session did not wait for it"
                    raise Error("conflict", what, f"the session goes on: beaker session attach {id}")
                if caller.fileno() in ready and not self._heard(held, id, news):
                    return
                if news.fd not in ready:
                    continue
                news.clear()
                view = self.sessions.view(id)
                for event in self._events(view):
                    if said.get(event["event"]) != event:
                        said[event["event"]] = event
                        caller.send(event)
                if news.wants_terminal and (given := self._given(view, news, replay)):
                    news.wants_terminal = False
                    held.hand_over(given)
                if view.session.state in (State.EXITED, State.FINALIZED):
                    self._farewell(caller, view)
                    return
                if brief and (view.session.state == State.STARTED or view.position):
                    return

    @contextmanager
    def _holding(self, caller: Caller, id: str) -> Iterator[Held]:
        held = Held(caller)
        self._held.add((id, held))
        try:
            yield held
        finally:
            self._held.discard((id, held))
            held.close()

    def _release(self, session: Session) -> None:
        """Cut off whoever has the session's terminal and does not read: engines wait for the slowest of its readers.

        That is a command line that was stopped. One whose own terminal is stuck reads on, and so says. A pipe may take
        its time, and is left alone.
        """
        others = [held for id, held in list(self._held) if id == session.id and session.request.tty]
        for held in others:
            held.ask()
        deadline = time.monotonic() + SILENT
        while any(held.asked is not None for held in others) and time.monotonic() < deadline:
            time.sleep(SILENT / 20)
        for held in others:
            if held.silent(SILENT):
                held.cut()

    def process(self, caller: Caller, session: Session, wanted: Request, terminal: bool, root: bool) -> None:
        """Run a second process in a running session, and tell `caller` how it ended.

        wanted: a request of which only command, env, workdir, stdin and size matter. terminal: it gets one, of that
        size. root: as root of the sandbox instead of oneself. Raises Error forbidden where that root would be real.
        """
        if root and not self.sandboxes.root:
            why = f"the {self.sandboxes.name} driver of this node gives no root, which would be the machine's"
            raise Error("forbidden", why, "leave --root out, or use an image that holds what you need")
        identity, claim = self.sessions.identity(session.id), session.claim or Claim()
        workdir = wanted.workdir or plan.workdir(session.request, identity)
        if root:
            identity = ROOT
        merged = replace(session.request, env=session.request.env + wanted.env)
        env = plan.environment(session.id, merged, claim, identity, self.lifecycle.node())
        handle, given = self.sandboxes.exec(
            session.id, wanted.command, env=env, identity=identity,
            workdir=workdir,
            size=wanted.size if terminal else None, stdin=wanted.stdin,
        )  # fmt: skip
        with closing(Held(caller)) as held:
            held.hand_over(given, handle)
            for ready in self._turns(caller, held):
                if held.fd in ready:
                    code = self.sandboxes.exec_exit(session.id, handle)
                    caller.send({"event": "ended", "exitCode": code, "message": ""})
                    return
                if caller.fileno() in ready and not self._resized(caller, session.id, handle):
                    return

    def rejoined(self, caller: Caller, session: Session, handle: str) -> None:
        """Wait for the end of a second process whose terminal `caller` has had since before this executor started."""
        while self.sandboxes.exec_running(session.id, handle):
            self.recheck(caller.token)
            if select.select([caller.fileno()], [], [], AWAIT)[0] and not self._resized(caller, session.id, handle):
                return
        code = self.sandboxes.exec_exit(session.id, handle)
        caller.send({"event": "ended", "exitCode": code, "message": ""})

    def _resized(self, caller: Caller, id: str, handle: str) -> bool:
        """Act on what the caller of a second process says, which is its size. False when it has left."""
        frame = caller.receive()
        if frame and "resize" in frame:
            self.sandboxes.resize(id, wire.window(frame["resize"]), handle)
        return frame is not None

    def _turns(self, caller: Caller, held: Held, *others: int) -> Iterator[set[int]]:
        """What is readable, again and again. A terminal that was held is in it once the other side has closed it."""
        watched = -1
        poll = select.poll()
        for descriptor in (caller.fileno(), *others):
            poll.register(descriptor, select.POLLIN)
        while True:
            if held.fd >= 0 and watched < 0:
                watched = held.fd
                poll.register(watched, select.POLLRDHUP)
            ready = {descriptor for descriptor, _ in poll.poll(FRESH * 1000)}
            try:
                self.recheck(caller.token)
            except Error as error:
                if error.code == "unauthorized":  # a revoked token closes terminals; the session itself goes on
                    held.cut()
                    raise
            if watched in ready and watched >= 0:
                poll.unregister(watched)  # said once
            yield ready

    def _given(self, view: View, news: Subscription, replay: bool) -> Terminal | None:
        """The terminal that this follower should have now: the one it was offered at the start, or a new one."""
        if news.terminal:
            given, news.terminal = news.terminal, None
            return given
        if view.session.state != State.STARTED:
            return None
        self._release(view.session)
        try:
            given = self.sandboxes.attach(view.session.id, replay=replay)
        except Error as error:
            if error.code in ("not_found", "conflict"):
                return None  # it ended just now, and the next news will say so
            raise
        if news.size:  # a full-screen program repaints when the size changes, even if it comes back to what it was
            self.sandboxes.resize(view.session.id, (news.size[0], news.size[1] + 1))
            self.sandboxes.resize(view.session.id, news.size)
        return given

    def _events(self, view: View) -> Iterator[dict]:
        session = view.session
        if view.position:
            nodes = self.nodes(session.request.gpus or 0)
            yield {"event": "queued", "position": view.position, "reason": view.reason, "nodes": nodes}
        if session.claim and session.state in LIVE:
            claim = session.claim
            ports = {"ports": wire.mappings(claim)} if claim.ports else {}
            yield {"event": "reserved", "gpus": list(claim.gpus), "cpus": claim.cpus, "memory": claim.memory, **ports}
        if view.progress and session.state == State.SCHEDULED:
            done, total, layers = view.progress.done, view.progress.total, view.progress.layers
            yield {"event": "pull", "done": done, "total": total, "layers": list(layers)}

        if view.notice:
            yield {"event": "notice", "text": view.notice}

    def _farewell(self, caller: Caller, view: View) -> None:
        session = view.session
        if session.error:
            raise Error(session.error, session.message)
        caller.send(
            {"event": "ended", "exitCode": session.exit_code, "message": session.message, "job": self.job(view)}
        )

    def _heard(self, held: Held, id: str, news: Subscription) -> bool:
        """Act on what a follower says. False when it has left."""
        frame = held.caller.receive()
        if frame is None:
            return False
        session = self.sessions.view(id).session
        running = session.state == State.STARTED
        if "resize" in frame:
            news.size = wire.window(frame["resize"])
            if running:
                self.sandboxes.resize(id, news.size)
        elif "signal" in frame and running:
            self.sandboxes.signal(id, wire.signal(frame["signal"]))
        elif "reading" in frame:
            held.asked = None
        elif frame.get("cancel"):
            self.lifecycle.stop(id, session.account)
        return True
