"""What a session may ask from inside, through a socket of its own: about itself, and the server in its account's name.

Owns these sockets and the sessions' tokens. Which session asks is known by the socket that it asks through, which takes
processes of that session alone; nothing that is said is believed. What the server is asked goes there with the
session's own token, so the server decides what a session may. Frames are the door's.
"""

from __future__ import annotations

import base64
import binascii
import logging
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from .. import ids
from ..client import Client
from ..errors import Error
from ..model import Identity, Request
from ..transport import Endpoint
from .agent import Agents
from .caller import FRAME, Caller, answering
from .listener import Listener, bind
from .loop import Loop, Workers
from .peers import check_inside
from .rundir import AGENT, SOCKET, RunDirectories

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds that the server is given to answer
TOKEN_AFTER = 1.0  # seconds until a session that has not asked for anything gets a token, for when the author is gone
AT_ONCE, AGENTS_AT_ONCE = 8, 16  # callers of a session's sockets; further ones wait
THREADS, EACH = 12, 3  # for what sessions ask of the server, which may be slow; so many for one session
OUTSIDE = ("attach", "create", "doctor", "exec", "logs", "node")  # operations of the door that a session has not
DEFAULT_WORKSPACE = "default"


class Inside:
    """answer(id, operation, request): the frames about a session that need no server, None for an unknown operation.

    init(id): a pidfd of a session's first process, as `Sandboxes.init`.
    """

    def __init__(self, loop: Loop, directory: Path, server: Endpoint, init: Callable[[str], int | None]) -> None:
        self._loop, self._init = loop, init
        self.directories, self.server = RunDirectories(directory), server
        self.answer: Callable[[str, str, dict], list[dict] | None] = lambda _id, _operation, _request: None
        self._tokens: dict[str, str] = {}  # of the authors, in memory alone, until their sessions have their own
        self._agents: dict[str, Agents] = {}
        self._listeners: dict[str, list[Listener]] = {}
        self._gone: set[str] = set()  # that did not live when last looked
        self._lock = threading.Lock()
        self._keeping = threading.Lock()  # a token comes whenever the server answers, and must not outlive its session
        self._workers = Workers("inside", THREADS, EACH)

    # -- a session's life

    def introduce(self, id: str, token: str) -> None:
        """The author of a session shows a token: what the session's own can be made with."""
        if not self.directories.token(id):
            with self._lock:
                self._tokens[id] = token

    def keep_token(self, id: str, token: str) -> None:
        """The server, which handed the session on, has given it its own token."""
        if token:
            self.directories.keep_token(id, token)

    def lend(self, id: str, agent: int) -> None:
        """Whoever attached has an SSH agent: take over the connection to it."""
        with self._lock:
            agents = self._agents.setdefault(id, Agents(self._loop))
        agents.add(agent)

    def forget(self, id: str) -> None:
        with self._lock:
            self._tokens.pop(id, None)

    def prepare(self, id: str, request: Request, identity: Identity) -> tuple[Path, list[Path]]:
        """Make a session's directory, with its socket and secrets: it, and the files of its `secret_mounts`.

        Raises Error, that of the server for a secret that the author cannot read.
        """
        path = self.directories.make(id)
        self._listen(id)
        variables, files = {}, []
        if request.secret_env or request.secret_mounts:
            workspace = request.workspace or DEFAULT_WORKSPACE
            with closing(Client(self.server, self._token(id), PATIENCE)) as client:
                variables = {name: client.read_secret(workspace, secret) for name, secret in request.secret_env}
                files = [client.read_secret(workspace, secret) for secret, _ in request.secret_mounts]
        else:  # its start need not wait for that, and a short session needs none
            later = self._workers.submit, id, partial(self._get_token, id)
            self._loop.soon(self._loop.asyncio.call_later, TOKEN_AFTER, *later)
        return path, self.directories.keep_secrets(id, identity, variables, files)

    def resume(self, live: Callable[[], Iterable[str]]) -> None:
        """Listen again for the sessions that are live, and remove what is left of others."""
        known = {*self.directories.ids(), *self._tokens, *self._agents}
        alive = set(live())
        for id in known & alive:
            if self.directories.path(id).is_mount():
                self._listen(id)
        gone = known - alive
        for id in gone & self._gone:  # not those that are just being made
            self.close(id)
        self._gone = gone

    def close(self, id: str) -> None:
        """A session has ended: nothing of it is left."""
        self.forget(id)
        with self._lock:
            parts = [*self._listeners.pop(id, ()), *([self._agents.pop(id)] if id in self._agents else [])]
        for part in parts:
            part.close()
        with self._keeping:
            self.directories.remove(id)

    def _get_token(self, id: str) -> None:
        try:
            self._token(id)
        except Error as error:
            log.info("session %s has no token yet: %s", id, error)
        except Exception:
            log.exception("session %s has no token yet", id)

    def _token(self, id: str) -> str:
        """The session's own token, made now with its author's if need be. Raises Error."""
        with self._lock:
            author = self._tokens.get(id, "")
        if not (token := self.directories.token(id)):
            if not author:
                raise Error(
                    "unauthorized",
                    f"the session {id} has no token of its own: the executor restarted, the server was away, or the "
                    "token that it was made with was revoked",
                    "attach to it once from outside",
                )
            with closing(Client(self.server, author, PATIENCE)) as client:
                body = {"name": f"session {id}", "scope": "session", "session": id}
                # Not the same key for another author's token: one that was revoked was answered already.
                token = client.create_token(body, key=f"session-{id}-{ids.hash_token(author)[:12]}")["token"]
            with self._keeping:
                if not self.directories.path(id).exists():
                    raise Error("not_found", f"the session {id} has ended")
                self.directories.keep_token(id, token)
        self.forget(id)
        return token

    # -- the socket

    def _listen(self, id: str) -> None:
        with self._lock:
            if id in self._listeners:
                return
            path, agents = str(self.directories.path(id)), self._agents.setdefault(id, Agents(self._loop))
            own = bind(path, SOCKET, socket.SOCK_SEQPACKET)
            try:
                agent = bind(path, AGENT, socket.SOCK_STREAM)
            except BaseException:
                own.close()
                raise
            failed = partial(log.error, "a socket of session %s takes nobody any more: %s", id)
            self._listeners[id] = [
                Listener(self._loop, own, partial(self._serve, id), failed, AT_ONCE),
                Listener(self._loop, agent, partial(self._serve_agent, id, agents), failed, AGENTS_AT_ONCE),
            ]

    async def _serve(self, id: str, connection: socket.socket) -> None:
        caller = Caller(self._loop, connection, self._workers, id)
        async with answering(caller):
            refused = None
            try:
                await caller.work(self._check, id, connection)
            except Error as error:
                refused = error
            request = await caller.first()  # before any answer: one to what was not read is lost with the connection
            if refused:
                raise refused
            if request is not None:
                caller.beat(request)
                for frame in await caller.work(self._frames, id, request):
                    await caller.send(frame)

    async def _serve_agent(self, id: str, agents: Agents, connection: socket.socket) -> None:
        try:
            await self._loop.work(self._workers, id, self._check, id, connection)
            await agents.serve(connection)
        except Error:
            pass
        finally:
            self._loop.passing.close(connection)

    def _check(self, id: str, connection: socket.socket) -> None:
        try:
            check_inside(connection, partial(self._init, id))
        except Error as error:
            log.warning("refused at a socket of session %s: %s", id, error.message)
            raise

    def _frames(self, id: str, request: dict) -> Iterable[dict]:
        operation = str(request.get("op"))
        if request.get("v") != 1:
            raise Error("invalid", f"the executor does not know version {request.get('v')!r}", "update beaker")
        if operation in OUTSIDE:
            raise Error("forbidden", "a session cannot do this from inside", "run this on the machine itself")
        if operation == "rest":
            return [self._ask_server(id, request)]
        frames = self.answer(id, operation, request)
        if frames is None:
            raise Error("invalid", f"the executor does not know {operation!r}", "update beaker")
        return frames

    def _ask_server(self, id: str, request: dict) -> dict:
        method, path, kind = (request.get(key) for key in ("method", "path", "type"))
        if method not in ("GET", "POST", "PUT", "PATCH", "DELETE") or not isinstance(path, str):
            raise Error("invalid", f"{method!r} {path!r} is no request", "update beaker")
        if not path.isascii() or not path.isprintable() or " " in path:
            raise Error("invalid", f"{path!r} is no path", "update beaker")
        parts = unquote(path.partition("?")[0]).split("/")
        if path.startswith("/") or {".", ".."} & {*parts}:  # beside the API are the console and what monitors read
            raise Error("invalid", f"{path!r} is no path of the API", "name one below /api/v3/")
        try:
            body = None if request.get("body") is None else base64.b64decode(request["body"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise Error("invalid", "the body is not in base 64", "update beaker") from None
        headers = {"Content-Type": kind} if kind in ("application/json", "application/octet-stream") else {}
        with closing(Client(self.server, self._token(id), PATIENCE)) as client:
            try:
                answer = client.forward(str(method), path, body, headers)
            except Error as error:
                if error.code != "unauthorized":
                    raise
                self.directories.forget_token(id)
                why = "the token of this session has ended with the one that it was made with"
                raise Error(
                    "unauthorized", why, "attach to the session once from outside, with a valid token"
                ) from error
        encoded = base64.b64encode(answer).decode()
        if len(encoded) > FRAME - 1024:
            raise Error("invalid", f"the answer has {len(answer)} bytes", "ask for less")
        return {"body": encoded}
