"""The executor's door: a unix socket that speaks one JSON frame per packet (protocol: docs/architecture.md).

Owns who is calling, what they may do and how many at once. What then happens is the business of `sessions`, `lifecycle`
and `following`. Terminal bytes never pass through. Each connection is a coroutine in the loop. A handler runs in a
worker, as it may block. It returns the frames of its answer, an iterator of them that may block too, or a coroutine
that the loop goes on with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from .. import ids, wire
from ..errors import Error
from ..model import Identity, Session, State
from ..sandbox import Finding
from . import admission, images
from .access import Access
from .caller import FRAME, PATIENCE, Caller, answering
from .following import Following
from .lifecycle import Lifecycle
from .listener import Listener
from .loop import Loop, Workers
from .outputs import Outputs
from .passing import read
from .peers import Peer, credentials, peer
from .sessions import View

log = logging.getLogger(__name__)

PROBE = 3.0  # seconds for another executor to answer anything
STOP_PATIENCE = 35.0  # seconds without any news of a session that was told to stop
CALLERS = 2048  # connections at once: each may hold two descriptors and 30 kB. Root's are not counted
CALLERS_EACH = 512  # of one user: more than there are sessions on a machine, each followed by somebody
DESCRIPTORS = 4  # of what the process may open, one in so many is for a connection
REFUSED = 256  # callers who are told that they are too many; those beyond are not told
REFUSED_FOR = 1.0  # seconds that such a caller has to say what it came to say, before it hears
# Threads. What takes milliseconds, and what may wait long for a file system of homes, the server or an image: so nobody
# who wants to end, list or attach waits for that. One user has few at once, and some are root's alone.
QUICK, QUICK_EACH, SLOW, SLOW_EACH, ROOTS = 16, 4, 24, 6, 4

Frame = dict[str, Any]
Answer = list[Frame] | Iterator[Frame] | Coroutine[Any, Any, None]


class Door:
    """nodes(gpus): other machines that have them free. findings(): what `executor doctor` says.

    usage(): the last sample of what this machine uses.
    """

    def __init__(
        self, loop: Loop, path: str, lifecycle: Lifecycle, access: Access, nodes: Callable[[int], list[str]],
        findings: Callable[[], Iterable[Finding]], usage: Callable[[], dict],
    ) -> None:  # fmt: skip
        self.path, self.lifecycle, self.access, self.findings, self.usage = path, lifecycle, access, findings, usage
        self.loop = loop
        self.sessions = lifecycle.sessions
        self.following = Following(lifecycle, access, nodes, self._job)
        lifecycle.inside.answer = self.answer_inside
        self._quick = Workers("quick", QUICK, QUICK_EACH, ROOTS)
        self._slow = Workers("slow", SLOW, SLOW_EACH, ROOTS)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = min(CALLERS, files // DESCRIPTORS)
        self._callers: Counter[int] = Counter()  # connections, by uid
        self._outputs = Outputs()
        self._refused = 0  # callers who are being told so
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def listen(self) -> None:
        """Bind, in place of a socket where nobody answers any more. Raises Error conflict when another executor does.

        A process that was killed and cannot end keeps its socket open. That it is not alive, `fence` has made sure.
        """
        Path(self.path).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as probe:
            probe.settimeout(PROBE)
            try:
                probe.connect(self.path)
                probe.send(b"{}")
                probe.recv(FRAME)
            except (FileNotFoundError, ConnectionError, TimeoutError, BlockingIOError):
                Path(self.path).unlink(missing_ok=True)
            else:
                raise Error(
                    "conflict", f"another executor serves {self.path}", "stop it first, or choose another socket"
                )
        self._socket.bind(self.path)
        os.chmod(self.path, 0o666)  # the kernel says who calls; the token says which account
        self._socket.listen(1024)
        Listener(self.loop, self._socket, self._connected, self.loop.fail)

    def _connected(self, connection: socket.socket) -> Coroutine[Any, Any, None] | None:
        uid = credentials(connection).uid
        others = self._callers.total() - self._callers[0]
        # A user may hold as many as nobody holds, so there is always room for one more user.
        if uid and self._callers[uid] >= min(CALLERS_EACH, self._most - others):
            if self._refused >= REFUSED:
                self.loop.passing.close(connection)
                return None
            self._refused += 1
            return self._refuse(connection, uid)
        self._callers[uid] += 1
        return self._serve(connection, uid)

    async def _serve(self, connection: socket.socket, uid: int) -> None:
        try:
            caller = Caller(self.loop, connection, self._quick, uid)
            async with answering(caller):
                await self._converse(caller)
        finally:
            self._callers[uid] -= 1
            if not self._callers[uid]:
                del self._callers[uid]

    async def _refuse(self, connection: socket.socket, uid: int) -> None:
        try:
            with closing(Caller(self.loop, connection, self._quick, uid)) as caller:
                what = f"user {uid} has {self._callers[uid]} connections to the executor, and may have no more now"
                error = Error("unavailable", what, "close some, or try again a little later")
                await caller.turn(REFUSED_FOR)  # a caller that cannot ask would not hear
                if caller.readable:  # nor would one whose question is not read
                    read(caller.connection, FRAME)
                caller.try_send({"error": error.as_dict()})
        finally:
            self._refused -= 1

    async def _converse(self, caller: Caller) -> None:
        who: Peer | Error
        try:
            who = peer(caller.connection)
        except Error as error:
            who = error
        try:  # to read it before any answer: one to what was not read is lost with the connection
            request = await caller.first(takes=isinstance(who, Peer))  # no file of who has as many names as they like
        except Error:
            if isinstance(who, Error):
                raise who from None
            raise
        if request is None:
            return
        if isinstance(who, Error):
            raise who
        caller.beat(request)
        operation = str(request.get("op"))
        handler = HANDLERS.get(operation)
        if request.get("v") != 1 or handler is None:
            raise Error(
                "invalid", f"the executor does not know {operation!r} of version {request.get('v')!r}", "update beaker"
            )
        if operation in admission.ROOTS and who.uid == 0:
            account: dict = admission.ROOT
            identity = None
        else:
            account, identity = await caller.work(self._known, caller, who, str(operation), request)
            deadline = time.monotonic() + PATIENCE
            while not self.lifecycle.ready.is_set():
                if time.monotonic() > deadline:
                    what = "the container engine of this node does not answer"
                    raise Error("unavailable", what, "beaker executor doctor")
                await asyncio.sleep(0.05)
        workers = self._slow if operation in WAITING else self._quick
        answer = await self.loop.work(workers, who.uid, handler, self, caller, request, account, identity)
        if isinstance(answer, Coroutine):
            await answer
        elif isinstance(answer, list):
            for frame in answer:
                await caller.send(frame)
        else:
            while (found := await self.loop.work(workers, who.uid, next, answer, None)) is not None:
                await caller.send(found)

    def _known(self, caller: Caller, who: Peer, operation: str, request: dict) -> tuple[dict, Identity]:
        name, identity = admission.caller(who.uid, request.get("user"), self.lifecycle.settings.session_home)
        token = request.get("token")
        caller.token = token if isinstance(token, str) else ""
        account = self.access.check(caller.token, name, creates=operation == "create")
        admission.allow(operation, account)
        return account, identity

    # -- operations

    def _create(self, caller: Caller, request: dict, account: dict, identity: Identity) -> Answer:
        wanted = wire.request(
            request.get("session"),
            tty=request.get("tty", False),
            stdin=request.get("stdin", False),
            size=request.get("size"),
        )
        place, capacity = request.get("session") or {}, self.sessions.capacity
        admitted = admission.admit(
            wanted, identity, self.lifecycle.settings, capacity, self.lifecycle.node(),
            node=place.get("node"), cluster=place.get("cluster"), ranges=self.lifecycle.ranges(),
        )  # fmt: skip
        key = request.get("key")
        if key is not None and not (isinstance(key, str) and 0 < len(key) <= 200):
            raise Error("invalid", f"key: {key!r} is not an idempotency key", "send up to 200 characters")
        if caller.has_left:  # it gave up while this waited for its turn; nobody would learn of the session
            raise ConnectionResetError
        id, inside = ids.ulid(), self.lifecycle.inside
        inside.introduce(id, caller.token)
        try:
            session = self.sessions.create(account["name"], identity, admitted.request, key, id=id)
        except BaseException:
            inside.forget(id)
            raise
        if session.id != id:  # made before, with this key
            inside.forget(id)
        self._admit(session.id, caller)
        created = {"event": "created", "job": self._job(self.sessions.view(session.id))}
        created |= {"warning": admitted.warning} if admitted.warning else {}
        detach = bool(request.get("detach"))
        return self.following.session(
            caller, session, terminal=not detach, size=wanted.size, brief=detach, first=created, whole=True
        )

    def _attach(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> Answer:
        session = self._own(request, account)
        self._admit(session.id, caller)
        size = wire.window(request["size"]) if request.get("size") else None
        replay = request.get("replay", True) is True
        brief = request.get("detach") is True
        return self.following.session(
            caller, session, terminal=request.get("stream", True) is True and not brief, size=size, replay=replay,
            brief=brief, whole=request.get("whole") is True,
        )  # fmt: skip

    def _exec(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> Answer:
        session = self._own(request, account)
        if session.state != State.STARTED:
            raise Error(
                "conflict", f"session {session.id} is not running: it is {session.state}", "beaker session list"
            )
        self._admit(session.id, caller)
        body = {"command": request.get("command"), "envVars": request.get("env"), "workDir": request.get("workdir")}
        terminal = request.get("size") is not None
        wanted = wire.request(body, tty=terminal, stdin=request.get("stdin", False), size=request.get("size"))
        return self.following.process(caller, session, wanted, terminal, root=request.get("root") is True)

    def _exec_exit(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> Answer:
        session = self._own(request, account)
        return self.following.rejoined(caller, session, str(request.get("handle")))

    def _stop(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> Answer:
        return self._stopped(caller, self._own(request, account).id, account["name"])

    async def _stopped(self, caller: Caller, id: str, actor: str) -> None:
        """End a session, and say when it has ended. A caller that leaves meanwhile ends it all the same."""
        async with self.following.subscribed(caller, id, False, None) as news:
            await caller.work(self.lifecycle.stop, id, actor)
            while (view := await caller.work(self.sessions.view, id)).session.state != State.FINALIZED:
                heard = time.monotonic()
                while not news.news:
                    if caller.readable:
                        return
                    if time.monotonic() - heard >= STOP_PATIENCE:
                        why = self.sessions.cordoned or "see beaker executor doctor"
                        raise Error("unavailable", f"session {id} has not ended yet", why)
                    await caller.turn(STOP_PATIENCE)
                news.news = False
        await caller.send({"job": await caller.work(self._job, view)})

    def _list(self, _caller: Caller, request: dict, account: dict, _identity: Identity) -> Answer:
        ended, frames = request.get("finalized"), list[Frame]()
        for view in map(View, self.sessions.ledger.final(200)) if ended else self.sessions.views():
            own = view.session.account == account["name"]
            if own or request.get("all"):
                job = self._job(view)
                frames.append({"job": job if own else wire.redacted(job)})
        return [*frames, {"end": True}]

    def _get(self, _caller: Caller, request: dict, account: dict, _identity: Identity) -> Answer:
        session = self._own(request, account)
        return [{"job": self._job(self.sessions.view(session.id))}]

    def _logs(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> Answer:
        session = self._own(request, account)
        return self._handed_over(caller, self._output(caller, session))

    def _output(self, caller: Caller, session: Session) -> int:
        """A descriptor of a session's latest output. A file that only root may write, or memory."""
        if session.state != State.FINALIZED:
            live = (one.id for one in self.sessions.live())
            return self._outputs.of(session.id, lambda: self.lifecycle.logs(session), live)
        try:
            return os.open(self.lifecycle.output / session.id, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # not kept here
            found = [session.id]
            return self._outputs.of(session.id, lambda: self.access.logs(caller.token, session.id), found)

    async def _handed_over(self, caller: Caller, descriptor: int) -> None:
        try:
            await caller.send({"logs": True}, descriptor)
        finally:
            os.close(descriptor)

    def _node(self, _caller: Caller, _request: dict, _account: dict, _identity: Identity) -> Answer:
        has = self.sessions.inventory
        limits = wire.limits(has.gpus, has.cpus, has.memory)
        reason = self.sessions.cordoned
        return [{"node": {**self.lifecycle.node(), "limits": limits, "free": wire.free(self.sessions.free()),
                              "cordoned": bool(reason), "cordonReason": reason, "usage": self.usage()}}]  # fmt: skip

    def _doctor(self, *_: Any) -> Iterator[Frame]:
        for finding in self.findings():
            yield {"finding": finding.__dict__}
        yield {"end": True}

    def _images(self, caller: Caller, request: dict, _account: dict, _identity: Identity | None) -> Answer:
        return images.answer(caller, request, self.lifecycle)

    def _end_sessions(self, *_: Any) -> Iterator[Frame]:
        for id in self.lifecycle.end_all("the shutdown of this machine"):
            yield {"left": id}
        yield {"end": True}

    def _admit(self, id: str, caller: Caller) -> None:
        """What a session may have of its author who is here: their token, to get its own, and their SSH agent."""
        self.lifecycle.inside.introduce(id, caller.token)
        if caller.agent >= 0:
            agent, caller.agent = caller.agent, -1
            self.lifecycle.inside.lend(id, agent)

    def answer_inside(self, id: str, operation: str, request: dict) -> list[dict] | None:
        """What a session is told from inside about itself, which is all that it may name; None: nothing of the kind."""
        view = self.sessions.view(id)
        if request.get("id") not in (None, id, view.session.request.name):
            raise Error("forbidden", f"this session cannot see {request.get('id')!r}", "run this on the machine itself")
        if operation == "stop":
            self.lifecycle.stop(id, view.session.account)
            return [{"job": self._job(self.sessions.view(id))}]
        if operation == "list":
            return [{"job": self._job(view)}, {"end": True}]
        return [{"job": self._job(view)}] if operation == "get" else None

    def _own(self, request: dict, account: dict) -> Session:
        """The session that a request means, if it is one that this account may do it to."""
        reference = request.get("id")
        if reference is not None and not isinstance(reference, str):
            raise Error("invalid", f"id: {reference!r} is not a session", "give an id or a name")
        session = self.sessions.resolve(reference, account["name"])
        admission.allow(request["op"], account, session.account)
        return session

    def _job(self, view: View) -> dict[str, Any]:
        node = self.lifecycle.node()
        queue: dict[str, Any] = {"queuePosition": view.position, "reason": view.reason} if view.position else {}
        if view.notice:
            queue["notice"] = view.notice
        return wire.job(
            view.session, node=node["id"], hostname=node["hostname"], cluster=self.lifecycle.settings.cluster, **queue
        )


WAITING = ("create", "doctor", "end_sessions", "images", "logs")  # operations that may wait for what is slow
HANDLERS: dict[str, Callable[..., Answer]] = {
    "create": Door._create, "attach": Door._attach, "exec": Door._exec, "exec_exit": Door._exec_exit,
    "stop": Door._stop, "list": Door._list, "get": Door._get, "logs": Door._logs, "node": Door._node, "doctor":
    Door._doctor, "images": Door._images,
    "end_sessions": Door._end_sessions, }  # fmt: skip
