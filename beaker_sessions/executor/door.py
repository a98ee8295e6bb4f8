"""The executor's door: a unix socket that speaks one JSON frame per packet (protocol: docs/architecture.md).

Owns who is calling and what they may do; a thread each. What then happens is the business of `sessions`, `lifecycle`
and `following`. Terminal bytes never pass through.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from .. import ids, wire
from ..errors import Error
from ..model import Identity, Session, State
from ..sandbox import Finding
from . import admission, images
from .access import Access, Peer, peer
from .caller import PATIENCE, Caller
from .following import Following
from .lifecycle import Lifecycle
from .sessions import View

log = logging.getLogger(__name__)

STOP_PATIENCE = 35.0  # seconds without any news of a session that was told to stop


class Door:
    """nodes(gpus): other machines that have them free. findings(): what `executor doctor` says.

    usage(): the last sample of what this machine uses.
    """

    def __init__(
        self, path: str, lifecycle: Lifecycle, access: Access, nodes: Callable[[int], list[str]],
        findings: Callable[[], Iterable[Finding]], usage: Callable[[], dict],
    ) -> None:  # fmt: skip
        self.path, self.lifecycle, self.access, self.findings, self.usage = path, lifecycle, access, findings, usage
        self.sessions = lifecycle.sessions
        self.following = Following(lifecycle, access.account, nodes, self._job)
        lifecycle.inside.answer = self.answer_inside
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def listen(self) -> None:
        """Bind, in place of a socket that nobody answers any more. Raises Error conflict when another executor does."""
        Path(self.path).parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        with closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as probe:
            try:
                probe.connect(self.path)
            except (FileNotFoundError, ConnectionRefusedError):
                Path(self.path).unlink(missing_ok=True)
            else:
                raise Error(
                    "conflict", f"another executor serves {self.path}", "stop it first, or choose another socket"
                )
        self._socket.bind(self.path)
        os.chmod(self.path, 0o666)  # the kernel says who calls; the token says which account
        self._socket.listen(128)
        threading.Thread(target=self._accept, name="door", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                log.exception("the door cannot accept")
                time.sleep(0.1)
                continue
            threading.Thread(target=self._serve, args=(connection,), name="caller", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        caller = Caller(connection)
        with closing(connection), closing(caller):
            try:
                self._converse(caller)
            except Error as error:
                caller.refuse(error)
            except (ConnectionError, TimeoutError):
                pass  # the caller left, which ends nothing
            except Exception:
                incident = ids.ulid()
                log.exception("incident %s", incident)
                message = f"the executor failed (incident {incident})"
                caller.refuse(Error("internal", message, "tell the administrator, who finds it in the executor's log"))

    def _converse(self, caller: Caller) -> None:
        who: Peer | Error
        try:
            who = peer(caller.connection)
        except Error as error:
            who = error
        request = caller.receive()  # before any answer: one to what was not read is lost with the connection
        if request is None:
            return
        if isinstance(who, Error):
            raise who
        operation = request.get("op")
        handler = HANDLERS.get(str(operation))
        if request.get("v") != 1 or handler is None:
            raise Error(
                "invalid", f"the executor does not know {operation!r} of version {request.get('v')!r}", "update beaker"
            )
        if operation in ("doctor", "images") and who.uid == 0:
            handler(self, caller, request, admission.ROOT, None)
            return
        name, identity = admission.caller(who.uid, request.get("user"), self.lifecycle.settings.session_home)
        token = request.get("token")
        caller.token = token if isinstance(token, str) else ""
        account = self.access.check(caller.token, name, creates=operation == "create")
        admission.allow(str(operation), account)
        if not self.lifecycle.ready.wait(PATIENCE):
            raise Error("unavailable", "the container engine of this node does not answer", "beaker executor doctor")
        handler(self, caller, request, account, identity)

    # -- operations

    def _create(self, caller: Caller, request: dict, account: dict, identity: Identity) -> None:
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
        caller.send(created | ({"warning": admitted.warning} if admitted.warning else {}))
        detach = bool(request.get("detach"))
        self.following.session(caller, session.id, terminal=not detach, size=wanted.size, brief=detach)

    def _attach(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> None:
        session = self._own(request, account)
        self._admit(session.id, caller)
        size = wire.window(request["size"]) if request.get("size") else None
        replay = request.get("replay", True) is True
        self.following.session(
            caller, session.id, terminal=request.get("stream", True) is True, size=size, replay=replay
        )

    def _exec(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> None:
        session = self._own(request, account)
        if session.state != State.STARTED:
            raise Error(
                "conflict", f"session {session.id} is not running: it is {session.state}", "beaker session list"
            )
        self._admit(session.id, caller)
        body = {"command": request.get("command"), "envVars": request.get("env"), "workDir": request.get("workdir")}
        terminal = request.get("size") is not None
        wanted = wire.request(body, tty=terminal, stdin=request.get("stdin", False), size=request.get("size"))
        self.following.process(caller, session, wanted, terminal, root=request.get("root") is True)

    def _exec_exit(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> None:
        session = self._own(request, account)
        self.following.rejoined(caller, session, str(request.get("handle")))

    def _stop(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> None:
        session = self._own(request, account)
        with self.sessions.follow(session.id, False, None) as news:
            self.lifecycle.stop(session.id, account["name"])
            while self.sessions.view(session.id).session.state != State.FINALIZED:
                ready = select.select([news.fd, caller.fileno()], [], [], STOP_PATIENCE)[0]
                if not ready:
                    why = self.sessions.cordoned or "see beaker executor doctor"
                    raise Error("unavailable", f"session {session.id} has not ended yet", why)
                if caller.fileno() in ready:
                    return  # it left; the session is stopped all the same
                news.clear()
        caller.send({"job": self._job(self.sessions.view(session.id))})

    def _list(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> None:
        ended = request.get("finalized")
        for view in map(View, self.sessions.ledger.final(200)) if ended else self.sessions.views():
            own = view.session.account == account["name"]
            if own or request.get("all"):
                job = self._job(view)
                caller.send({"job": job if own else wire.redacted(job)})
        caller.send({"end": True})

    def _get(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> None:
        session = self._own(request, account)
        caller.send({"job": self._job(self.sessions.view(session.id))})

    def _logs(self, caller: Caller, request: dict, account: dict, _identity: Identity) -> None:
        session = self._own(request, account)
        output = self.lifecycle.logs(session) or (
            self.access.logs(caller.token, session.id) if session.state == State.FINALIZED else b""
        )
        reader, writer = os.pipe()
        try:
            caller.send({"logs": True}, reader)
        finally:
            os.close(reader)
        with open(writer, "wb") as pipe, suppress(BrokenPipeError):
            pipe.write(output)

    def _node(self, caller: Caller, _request: dict, _account: dict, _identity: Identity) -> None:
        has = self.sessions.inventory
        limits = wire.limits(has.gpus, has.cpus, has.memory)
        reason = self.sessions.cordoned
        caller.send({"node": {**self.lifecycle.node(), "limits": limits, "free": wire.free(self.sessions.free()),
                              "cordoned": bool(reason), "cordonReason": reason, "usage": self.usage()}})  # fmt: skip

    def _doctor(self, caller: Caller, _request: dict, account: dict, *_: Any) -> None:
        if account.get("role") != "admin":
            hint = "sudo beaker executor doctor"
            raise Error("forbidden", "what is wrong with a node is its administrators' business", hint)
        for finding in self.findings():
            caller.send({"finding": finding.__dict__})
        caller.send({"end": True})

    def _images(self, caller: Caller, request: dict, _account: dict, _identity: Identity | None) -> None:
        images.answer(caller, request, self.lifecycle)

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


HANDLERS: dict[str, Callable[..., None]] = {
    "create": Door._create, "attach": Door._attach, "exec": Door._exec, "exec_exit": Door._exec_exit,
    "stop": Door._stop, "list": Door._list, "get": Door._get, "logs": Door._logs, "node": Door._node, "doctor":
    Door._doctor, "images": Door._images, }  # fmt: skip
