"""Conversations that last: following a session through its life, and a second process in it.

Each is a coroutine, woken by news, by what the caller says, and often enough to notice a revoked token. While nothing
happens it costs no thread.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from .. import wire
from ..errors import Error
from ..model import LIVE, Claim, Identity, Request, Session, State
from ..sandbox import Framing, Terminal
from . import plan
from .access import Access
from .caller import Caller, Held
from .execs import Execs
from .lifecycle import Lifecycle
from .outputs import sealed
from .replay import SCANNED, alternate, shown
from .sessions import View
from .subscription import Subscription

LOOK = 1.0  # seconds between looks at what wakes nobody: the token, and whether output waits
FROZEN = 10.0  # seconds in which a command line must answer, lest what it does not read stops the session,
SILENT = 2.0  # and when somebody attaches
AWAIT = 0.2  # seconds between looks at a process of which no terminal says that it has ended
REDRAW = 0.1  # seconds in which a program notices another size
WHOLE = 8  # times that all output of a session is handed over: its receiver may keep that memory
NEEDLE = 1024  # bytes by which the beginning of the recent output is found in the older

ROOT = Identity("root", 0, 0, "/root", {0: "root"})


class Following:
    """access: says whether a token was revoked meanwhile. nodes(gpus): other machines that have them free."""

    def __init__(
        self,
        lifecycle: Lifecycle,
        access: Access,
        nodes: Callable[[int], list[str]],
        job: Callable[[View], dict],
    ) -> None:
        self.lifecycle, self.access, self.nodes, self.job = lifecycle, access, nodes, job
        self.sessions, self.sandboxes = lifecycle.sessions, lifecycle.sandboxes
        self.execs = Execs(self.sessions, self.sandboxes)
        self._wholes: Counter[str] = Counter()  # how often all output was handed over, by session
        self._held: set[tuple[str, Held]] = set()  # the terminals of main processes that callers use, by session

    async def session(
        self,
        caller: Caller,
        session: Session,
        *,
        terminal: bool,
        size: tuple[int, int] | None,
        replay: bool = True,
        brief: bool = False,
        first: dict[str, Any] | None = None,
        whole: bool = False,
    ) -> None:
        """Tell `caller` of a session until it has ended, or (brief) until it has begun to run or waits in the queue.

        first: said before all. whole: it follows from the start, and shall have all output, even if that comes too
        late for the streams.
        """
        try:
            await self._tell(caller, session, terminal, size, replay, brief, first, whole)
        except ConnectionError:
            await self._last_words(caller, session.id)
            raise

    async def _tell(
        self, caller: Caller, session: Session, terminal: bool, size: tuple[int, int] | None, replay: bool,
        brief: bool, first: dict[str, Any] | None, whole: bool,
    ) -> None:  # fmt: skip
        id, said = session.id, dict[str, dict]()
        if first:
            await caller.send(first)
        async with self.subscribed(caller, id, terminal, size) as news:
            with closing(Held(caller, session.request.tty)) as held:
                self._held.add((id, held))
                try:
                    while await self._turn(caller, held, id, news):
                        if not news.news:
                            continue
                        news.news = False
                        view, events = await caller.work(self._look, id)
                        for event in events:
                            if said.get(event["event"]) != event:
                                said[event["event"]] = event
                                await caller.send(event)
                        if news.wants_terminal and (found := await self._given(caller, view, news, replay, whole)):
                            news.wants_terminal = False
                            given, has_all = found
                            if has_all:
                                with _closed_on_failure(given):
                                    await self._earlier(caller, view.session, given.replay)
                                given = replace(given, replay=b"")
                            await held.hand_over(given)
                        if brief and (view.session.started or view.position):  # started: it may have ended since
                            if caller.readable and (frame := await caller.receive()):
                                await caller.work(self._heard, id, frame)  # perhaps gave up just before
                            await caller.send({"event": "detached"})
                            return
                        if view.session.state in (State.EXITED, State.FINALIZED):
                            if news.wants_terminal and whole and await caller.work(self._may_have_all, id):
                                output = await caller.work(self.lifecycle.unseen, view.session)
                                await self._earlier(caller, view.session, output)
                            await self._farewell(caller, view)
                            return
                finally:
                    self._held.discard((id, held))

    def _may_have_all(self, id: str) -> bool:
        """Once for each time that the executor or the connection was lost, which is seldom."""
        live = {id, *(session.id for session in self.sessions.live())}
        self._wholes = Counter({one: times for one, times in self._wholes.items() if one in live})
        self._wholes[id] += 1
        return self._wholes[id] <= WHOLE

    async def _last_words(self, caller: Caller, id: str) -> None:
        """Heed what a caller said before it left, which we may learn while we tell it something: perhaps it gave up."""
        for _ in range(2):  # the kernel tells first that it left without reading all, and what it said only then
            with suppress(ConnectionResetError, BlockingIOError):
                while frame := await caller.receive():
                    await caller.work(self._heard, id, frame)
                return

    @asynccontextmanager
    async def subscribed(
        self, caller: Caller, id: str, terminal: bool, size: tuple[int, int] | None
    ) -> AsyncIterator[Subscription]:
        news = Subscription(caller.wake, terminal, size)
        try:
            await caller.work(self.sessions.follow, id, news)
            yield news
        finally:
            await caller.work(self.sessions.leave, id, news)

    async def _turn(self, caller: Caller, held: Held, id: str, news: Subscription) -> bool:
        """Wait for something to do for a follower, and do what it says. False when it has left."""
        await self._wait(caller, held, LOOK)
        if held.is_cut or held.silent(FROZEN):
            held.cut()
            what = f"this terminal of session {id} took no output, and the session did not wait for it"
            raise Error("conflict", what, f"the session goes on: beaker session attach {id}")
        if not caller.readable:
            return True
        frame = await caller.receive()
        if frame is None:
            return False
        if "reading" in frame:
            held.asked = None
        elif "resize" in frame:
            news.size = wire.window(frame["resize"])
        await caller.work(self._heard, id, frame)
        return True

    async def _wait(self, caller: Caller, held: Held, seconds: float) -> None:
        """Wait until a caller is woken, with an eye on its token and its terminal. Raises Error unauthorized."""
        await caller.turn(seconds)
        held.ask()
        if self.access.is_fresh(caller.token):
            return
        try:
            await caller.work(self.access.account, caller.token)
        except Error as error:
            if error.code == "unauthorized":  # a revoked token closes terminals; the session itself goes on
                held.cut()
                raise

    async def _release(self, session: Session) -> None:
        """Cut off whoever has the session's terminal and does not read: engines wait for the slowest of its readers.

        That is a command line that was stopped. One whose own terminal is stuck reads on, and so says. A pipe may take
        its time, and is left alone.
        """
        others = [held for id, held in self._held if id == session.id and held.tty]
        for held in others:
            held.ask()
        deadline = time.monotonic() + SILENT
        while any(held.asked is not None for held in others) and time.monotonic() < deadline:
            await asyncio.sleep(SILENT / 20)
        for held in others:
            if held.silent(SILENT):
                held.cut()

    async def process(self, caller: Caller, session: Session, wanted: Request, terminal: bool, root: bool) -> None:
        """Run a second process in a running session, and tell `caller` how it ended.

        wanted: a request of which only command, env, workdir, stdin and size matter. terminal: it gets one, of that
        size. root: as root of the sandbox instead of oneself. Raises Error forbidden where that root would be real,
        limit when the account has as many as one may.
        """
        handle, given = await caller.work(self._execute, caller, session, wanted, terminal, root)
        with closing(Held(caller)) as held:
            await held.hand_over(given, handle)
            while not held.hung_up:
                await self._wait(caller, held, LOOK)
                if not held.hung_up and caller.readable and not await self._resized(caller, session.id, handle):
                    return
        await self._ended(caller, session, handle)

    def _execute(
        self, caller: Caller, session: Session, wanted: Request, terminal: bool, root: bool
    ) -> tuple[str, Terminal]:
        if root and not self.sandboxes.root:
            why = f"the {self.sandboxes.name} driver of this node gives no root, which would be the machine's"
            raise Error("forbidden", why, "leave --root out, or use an image that holds what you need")
        identity, claim = self.sessions.identity(session.id), session.claim or Claim()
        workdir = wanted.workdir or plan.workdir(session.request, identity)
        if root:
            identity = ROOT
        merged = replace(session.request, env=session.request.env + wanted.env)
        env = plan.environment(session.id, merged, claim, identity, self.lifecycle.node())
        size = wanted.size if terminal else None
        if caller.has_left:  # it gave up while this waited for its turn
            raise ConnectionResetError
        return self.execs.start(session, lambda: self.sandboxes.exec(
            session.id, wanted.command, env=env, identity=identity, workdir=workdir, size=size, stdin=wanted.stdin,
        ))  # fmt: skip

    async def rejoined(self, caller: Caller, session: Session, handle: str) -> None:
        """Wait for the end of a second process whose terminal `caller` has had since before this executor started."""
        nothing = Held(caller)
        while await caller.work(self.sandboxes.exec_running, session.id, handle):
            await self._wait(caller, nothing, AWAIT)
            if caller.readable and not await self._resized(caller, session.id, handle):
                return
        await self._ended(caller, session, handle)

    async def _ended(self, caller: Caller, session: Session, handle: str) -> None:
        code = await caller.work(self._exit_code, session, handle)
        await caller.send({"event": "ended", "exitCode": code, "message": ""})

    def _exit_code(self, session: Session, handle: str) -> int:
        code = self.sandboxes.exec_exit(session.id, handle)
        self.execs.ended(session, handle)
        return code

    async def _resized(self, caller: Caller, id: str, handle: str) -> bool:
        """Act on what the caller of a second process says, which is its size. False when it has left."""
        frame = await caller.receive()
        if frame and "resize" in frame:
            await caller.work(self._resize, id, wire.window(frame["resize"]), handle)
        return frame is not None

    def _look(self, id: str) -> tuple[View, list[dict]]:
        view = self.sessions.view(id)
        return view, list(self._events(view))

    async def _earlier(self, caller: Caller, session: Session, output: bytes) -> None:
        """Tell `caller` of all output before the stream that comes next, or the end. It may be longer than a frame."""
        if output:
            descriptor = await caller.work(_sealed, output, session.request.tty)
            try:
                framing = Framing.RAW if session.request.tty else Framing.MULTIPLEXED
                await caller.send({"event": "earlier", "framing": framing}, descriptor)
            finally:
                os.close(descriptor)

    async def _given(
        self, caller: Caller, view: View, news: Subscription, replay: bool, whole: bool
    ) -> tuple[Terminal, bool] | None:
        """The terminal that this follower should have now, and whether its replay is all that came before.

        It is the one that it was offered at the start, or a new one.
        """
        if news.terminal:
            offered, news.terminal = news.terminal, None
            return offered, False
        if view.session.state != State.STARTED:
            return None
        await self._release(view.session)
        whole = whole and await caller.work(self._may_have_all, view.session.id)
        attached, full_screen = await caller.work(self._attach, view.session, replay, whole)
        if attached and news.size:  # a full-screen program draws anew when the size changes
            with _closed_on_failure(attached):
                await caller.work(self._resize, view.session.id, (news.size[0], news.size[1] + 1))
                if full_screen:  # and some compare it with what it was when they last looked
                    await asyncio.sleep(REDRAW)
                await caller.work(self._resize, view.session.id, news.size)
        return (attached, whole) if attached else None

    def _resize(self, id: str, size: tuple[int, int], process: str = "") -> None:
        with _ended_is_fine():
            self.sandboxes.resize(id, size, process)

    def _attach(self, session: Session, replay: bool, whole: bool) -> tuple[Terminal | None, bool]:
        """A connection to a session's terminal, None when it has just ended, and whether its screen is a program's."""
        try:
            if whole:
                given = self.sandboxes.attach(session.id, replay=True, whole=True)
                return given, session.request.tty and alternate(given.replay)
            older = self.sandboxes.logs(session.id, SCANNED) if replay and session.request.tty else b""
            given = self.sandboxes.attach(session.id, replay=replay)
        except Error as error:
            if error.code in ("not_found", "conflict"):
                return None, False  # the next news will say so
            raise
        if not older:
            return given, False
        begin = older.rfind(given.replay[:NEEDLE]) if given.replay else len(older)
        older = older[:begin] if begin >= 0 else older
        return replace(given, replay=shown(older, given.replay)), alternate(older + given.replay)

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

    async def _farewell(self, caller: Caller, view: View) -> None:
        session = view.session
        if session.error:
            raise Error(session.error, session.message)
        job = await caller.work(self.job, view)
        await caller.send({"event": "ended", "exitCode": session.exit_code, "message": session.message, "job": job})

    def _heard(self, id: str, frame: dict) -> None:
        """Act on what a follower says."""
        session = self.sessions.view(id).session
        running = session.state == State.STARTED
        if "resize" in frame:
            if running:
                self._resize(id, wire.window(frame["resize"]))
        elif "signal" in frame and running:
            number = wire.signal(frame["signal"])
            with _ended_is_fine():
                self.sandboxes.signal(id, number)
        elif frame.get("cancel"):
            self.lifecycle.stop(id, session.account)


def _sealed(output: bytes, tty: bool) -> int:
    """A descriptor of output as it is to be shown: of a terminal's the end, as long as one may be on a screen."""
    return sealed(shown(output[:-SCANNED], output[-SCANNED:]) if tty else output)


@contextmanager
def _closed_on_failure(given: Terminal) -> Iterator[None]:
    """Nobody else has this terminal, and what nobody reads stops the session."""
    try:
        yield
    except BaseException:
        os.close(given.fd)
        raise


@contextmanager
def _ended_is_fine() -> Iterator[None]:
    """What is done to a session may find that it has just ended: its follower hears that next, with the exit code."""
    try:
        yield
    except Error as error:
        if error.code not in ("not_found", "conflict"):
            raise
