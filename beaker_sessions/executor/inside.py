"""What a session may ask from inside, through a socket of its own: about itself, and the server in its account's name.

Owns these sockets and the sessions' tokens. Which session asks is known by the socket that it asks through, which no
other session and no other user of the machine can reach; nothing that is said is believed. What the server is asked
goes there with the session's own token, so the server decides what a session may. Frames are the door's.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path

from .. import ids
from ..client import Client
from ..errors import Error
from ..model import Identity, Request
from .caller import FRAME, Caller
from .rundir import SOCKET, RunDirectories

log = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds that the server is given to answer
AT_ONCE = 8  # conversations of one session
OUTSIDE = ("attach", "create", "doctor", "exec", "logs", "node")  # operations of the door that a session has not
DEFAULT_WORKSPACE = "default"


class Inside:
    """answer(id, operation, request): the frames about a session that need no server, None for an unknown operation."""

    def __init__(self, directory: Path, address: str) -> None:
        self.directories, self.address = RunDirectories(directory), address
        self.answer: Callable[[str, str, dict], list[dict] | None] = lambda _id, _operation, _request: None
        self._tokens: dict[str, str] = {}  # of the authors, in memory alone, until their sessions have their own
        self._listening: dict[str, socket.socket] = {}
        self._lock = threading.Lock()

    # -- a session's life

    def introduce(self, id: str, token: str) -> None:
        """The author of a session shows a token: what the session's own can be made with."""
        if not self.directories.token(id):
            with self._lock:
                self._tokens[id] = token

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
            with closing(Client(self.address, self._token(id), PATIENCE)) as client:
                variables = {name: client.read_secret(workspace, secret) for name, secret in request.secret_env}
                files = [client.read_secret(workspace, secret) for secret, _ in request.secret_mounts]
        else:  # its start need not wait for that
            threading.Thread(target=self._get_token, args=(id,), name=f"token {id}", daemon=True).start()
        return path, self.directories.keep_secrets(id, identity, variables, files)

    def resume(self, live: Callable[[], Iterable[str]]) -> None:
        """Listen again for the sessions that are live, and remove what is left of others."""
        found = self.directories.ids()  # before asking who lives: what is made meanwhile is not in it
        alive = set(live())
        for id in found:
            if id in alive:
                with suppress(FileNotFoundError):
                    self._listen(id)
            else:
                self.close(id)

    def close(self, id: str) -> None:
        """A session has ended: nothing of it is left."""
        self.forget(id)
        with self._lock:
            listening = self._listening.pop(id, None)
        if listening is not None:
            with suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in accept
            listening.close()
        self.directories.remove(id)

    def _get_token(self, id: str) -> None:
        try:
            self._token(id)
        except Error as error:
            log.info("session %s has no token yet: %s", id, error)

    def _token(self, id: str) -> str:
        """The session's own token, made now with its author's if need be. Raises Error."""
        with self._lock:
            author = self._tokens.get(id, "")
        if not (token := self.directories.token(id)):
            if not author:
                raise Error(
                    "unauthorized",
                    f"the session {id} has no token of its own, as the executor restarted or the server was away",
                    "attach to it once from outside",
                )
            with closing(Client(self.address, author, PATIENCE)) as client:
                body = {"name": f"session {id}", "scope": "session", "session": id}
                token = client.create_token(body, key=f"session-{id}")["token"]
            self.directories.keep_token(id, token)
        self.forget(id)
        return token

    # -- the socket

    def _listen(self, id: str) -> None:
        with self._lock:
            if id in self._listening:
                return
            listening = self._listening[id] = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = os.open(self.directories.path(id), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            path = f"/proc/self/fd/{folder}/{SOCKET}"  # short: a unix socket's path has at most 107 bytes
            with suppress(FileNotFoundError):
                os.unlink(path)
            listening.bind(path)
            os.chmod(path, 0o666)  # root of the session is nobody in particular outside
            listening.listen(AT_ONCE)
        except BaseException:
            with self._lock:
                self._listening.pop(id, None)
            listening.close()
            raise
        finally:
            os.close(folder)
        threading.Thread(target=self._accept, args=(id, listening), name=f"inside {id}", daemon=True).start()

    def _accept(self, id: str, listening: socket.socket) -> None:
        """A session that asks too much at once makes itself wait, and nobody else."""
        free = threading.BoundedSemaphore(AT_ONCE)

        def serve(connection: socket.socket) -> None:
            try:
                self._serve(id, connection)
            finally:
                free.release()

        while True:
            free.acquire()
            try:
                connection, _ = listening.accept()
            except OSError:
                free.release()
                with self._lock:
                    if self._listening.get(id) is not listening:
                        return  # closed
                log.exception("the socket of session %s cannot accept", id)
                time.sleep(0.5)
                continue
            threading.Thread(target=serve, args=(connection,), name=f"inside {id}", daemon=True).start()

    def _serve(self, id: str, connection: socket.socket) -> None:
        with closing(connection):
            caller = Caller(connection)
            try:
                request = caller.receive()
                if request is not None:
                    for frame in self._frames(id, request):
                        caller.send(frame)
            except Error as error:
                caller.refuse(error)
            except OSError:
                pass  # it left
            except Exception:
                incident = ids.ulid()
                log.exception("incident %s", incident)
                message = f"the executor failed (incident {incident})"
                caller.refuse(Error("internal", message, "tell the administrator, who finds it in the executor's log"))

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
        try:
            body = None if request.get("body") is None else base64.b64decode(request["body"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise Error("invalid", "the body is not in base 64", "update beaker") from None
        headers = {"Content-Type": kind} if kind in ("application/json", "application/octet-stream") else {}
        with closing(Client(self.address, self._token(id), PATIENCE)) as client:
            answer = client.forward(str(method), path, body, headers)
        encoded = base64.b64encode(answer).decode()
        if len(encoded) > FRAME - 1024:
            raise Error("invalid", f"the answer has {len(answer)} bytes", "ask for less")
        return {"body": encoded}
