"""What holds for every request: who it is from, how long it may be, and that each failure has one shape.

Owns the translation between HTTP and `errors.Error`; knows no path but those that are for everybody.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Coroutine
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
from .service import Service

BODY_LIMIT = 2 << 20  # bytes
PUBLIC = ("/healthz", "/openapi.json")  # all else of the API needs a token, also what does not exist
API = ("/api/", "/metrics")  # for programs, which send a token; all other paths are the console's
log = logging.getLogger(__name__)


class Ascii(JSONResponse):
    """JSON in ASCII, because command lines may hold bytes that are not UTF-8."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class Guard:
    """Lets nothing pass without a token, nor more than BODY_LIMIT; what nobody foresaw becomes an id in the log.

    console: the application for people, which asks for a cookie instead, and shows failures as pages.
    """

    def __init__(self, app: ASGIApp, service: Service, console: ASGIApp) -> None:
        self.app = app
        self.service = service
        self.console = console

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket needs a check of its own first
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            headers = Headers(scope=scope)
            app = self.app
            if scope["path"].startswith(API):
                kind, _, token = headers.get("authorization", "").partition(" ")
                token = token.strip() if kind.lower() == "bearer" else ""
                key = headers.get("idempotency-key", "")
                scope.setdefault("state", {})["caller"] = await run_in_threadpool(self.service.authenticate, token, key)
            elif scope["path"] not in PUBLIC:
                app = self.console
            length = headers.get("content-length", "0")
            if "transfer-encoding" in headers or not length.isdecimal() or int(length) > BODY_LIMIT:
                raise Error("invalid", f"the request's length is not known, or over {BODY_LIMIT} bytes", "send less")
            await app(scope, receive, sending)
        except Error as error:
            await answer(error)(scope, receive, send)
        except Exception:
            id = ids.ulid()
            log.exception("%s %s failed, error id %s", scope["method"], scope["path"], id)
            if started:
                raise
            hint = f"tell an administrator this id: {id}"
            await answer(Error("internal", f"something unexpected happened in the server ({id})", hint))(
                scope, receive, send
            )


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
