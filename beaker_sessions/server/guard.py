"""What holds for every request: who it is from, how long it may be, and that each failure has one shape.

Owns the translation between HTTP and `errors.Error`; knows no path but those that are for everybody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import ids
from ..bodies import invalid
from ..errors import Error
from ..model import Scope as TokenScope
from .failures import Failures
from .gate import ROOT
from .service import Service
from .turns import Turns

BODY_LIMIT = 2 << 20  # bytes
FORM_LIMIT = 64 << 10  # of the console's, which reads those of POST alone
PUBLIC = ("/healthz",)  # all else of the API needs a token, also what does not exist
API = ("/api/", "/metrics", "/openapi.json")  # for programs, which send a token; all other paths are the console's
SIGN_IN = "/sign-in"  # where the console takes a token
log = logging.getLogger(__name__)


class TooLong(Error):
    """More than the limit was sent, or is announced."""

    def __init__(self, limit: int) -> None:
        super().__init__("invalid", f"the request has a body of more than {limit} bytes", "send less")


class Ascii(JSONResponse):
    """JSON in ASCII, because command lines may hold bytes that are not UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class Guard:
    """Lets nothing pass without a token, nor more than BODY_LIMIT; what nobody foresaw becomes an id in the log.

    console: the application for people, which asks for a cookie instead, and shows failures as pages. Whoever sends
    wrong tokens to either waits for the answers. Of one account, or of one peer that has shown no token yet, few are at
    work at once; executors do not wait for turns, nor does root here, which is where this machine's executor asks.
    """

    def __init__(self, app: ASGIApp, service: Service, console: ASGIApp) -> None:
        self.app = app
        self.service = service
        self.console = console
        self.failures = Failures()
        self.turns = Turns()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket needs a check of its own first
            await send({"type": "websocket.close", "code": 1008})
            return
        started, showed = False, scope["path"] == SIGN_IN  # whether a token was shown
        connection = scope.setdefault("state", {}).get("connection")  # of `web`, where that serves

        peer = connection.peer if connection else ""
        turn = AsyncExitStack()  # left when the answer begins, or by who waits for something to happen

        async def sending(message: Message) -> None:
            nonlocal started
            await turn.aclose()
            if showed and not started and message.get("status") == 401:
                await self._wait(peer)
            started = True
            await send(message)

        try:
            headers = Headers(scope=scope)
            app, who, limit = self.app, "" if peer == ROOT else peer or "nobody known", BODY_LIMIT
            if scope["path"].startswith(API):
                kind, _, token = headers.get("authorization", "").partition(" ")
                token = token.strip() if kind.lower() == "bearer" else ""
                key, showed = headers.get("idempotency-key", ""), bool(token)
                async with AsyncExitStack() as asking:
                    await self.turns.own(asking, who)
                    caller = await run_in_threadpool(self.service.authenticate, token, key)
                scope["state"]["caller"] = caller
                if caller.scope == TokenScope.EXECUTOR:
                    who = ""
                    if connection:
                        connection.executor()
                elif who:
                    who = f"account {caller.account_id}"
            elif scope["path"] in PUBLIC:
                limit = 0
            else:
                app, limit = self.console, FORM_LIMIT if scope["method"] == "POST" else 0
            body = await _body(headers, receive, limit)
            if body is None:  # it went away
                return
            async with turn:
                await self.turns.among_all(turn, who)
                if not (connection and connection.gone):
                    scope["state"]["turn"] = turn
                    await app(scope, _replayed(body, receive), sending)
        except Error as error:
            await answer(error, 413 if isinstance(error, TooLong) else 0)(scope, receive, sending)
        except Exception:
            id = ids.ulid()
            log.exception("%s %s failed, error id %s", scope["method"], scope["path"], id)
            if started:
                raise
            hint = f"tell an administrator this id: {id}"
            await answer(Error("internal", f"something unexpected happened in the server ({id})", hint))(
                scope, receive, send
            )

    async def _wait(self, peer: str) -> None:
        if peer != ROOT:  # this machine's executor, which asks for whoever comes to its door
            await asyncio.sleep(self.failures.wait(peer, time.monotonic()))


async def _body(headers: Headers, receive: Receive, limit: int) -> bytes | None:
    """All of it, None when the client went away. Raises TooLong, before anything is read where that is announced."""
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise TooLong(limit)
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise TooLong(limit)
        if not message.get("more_body"):
            return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body, then what else comes: the client's leaving."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def answer(error: Error, status: int = 0) -> Response:
    """The response that carries an error; status: HTTP's own where it says more than ours."""
    status = status or error.status
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return Ascii(error.as_dict() | {"code": status}, status, headers)


def handlers() -> dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]]:
    """For failures that FastAPI itself finds, and for the service's."""

    async def own(_: Request, error: Error) -> Response:
        return answer(error)

    async def validation(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(Error("invalid", f"the body is not JSON: {first['ctx']['error']}", "send JSON"))
        return answer(invalid(error.errors(), at=1))

    async def http(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        if error.status_code == 404:
            return answer(Error("not_found", f"there is no {what}", "see /openapi.json"))
        return answer(Error("invalid", f"{what}: {error.detail}", "see /openapi.json"), error.status_code)

    return {Error: own, RequestValidationError: validation, HTTPException: http}
