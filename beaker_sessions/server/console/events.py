"""Server-sent events: `changed`, when something on a page may look different. The page then loads itself again.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html. Must not say what changed: what somebody may see
is decided when the page is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ...errors import Error
from ..changes import Changes
from ..service import Service
from .visit import HEADERS, cookie

LOOK = 5.0  # seconds between looks at what no commit tells: silent nodes, tokens that ended
PAUSE = 1.0  # seconds between two events, at least


async def events(request: Request, service: Service, changes: Changes) -> Response:
    """The stream for what `on` names: ids, or `*`. 204, on which browsers give up, when nobody is signed in."""
    secret = request.cookies.get(cookie(request), "")
    try:
        who = await run_in_threadpool(service.visitor, secret)
    except Error as error:
        return Response(status_code=204 if error.code == "unauthorized" else error.status, headers=HEADERS)
    ids = request.query_params.get("on", "").split(",")[:8]
    headers = HEADERS | {"X-Accel-Buffering": "no"}
    return StreamingResponse(
        _stream(service, changes, secret, ids, who.account_id), media_type="text/event-stream", headers=headers
    )


async def _stream(service: Service, changes: Changes, secret: str, ids: list[str], owner: str) -> AsyncIterator[str]:
    with changes.watch(ids, owner) as event:
        if event is None:
            return
        yield "retry: 3000\n\n"
        since = datetime.now(UTC)
        while True:
            try:
                await asyncio.wait_for(event.wait(), LOOK)
            except TimeoutError:
                yield ": still here\n\n"
            if changes.over:
                return
            try:
                await run_in_threadpool(service.visitor, secret)
                now = datetime.now(UTC)
                silent = await run_in_threadpool(service.fallen_silent, since)
                since = now
            except Error as error:
                if error.code == "unauthorized":
                    yield "event: over\ndata:\n\n"
                    return
                continue  # the database is away; the page polls and says so
            if event.is_set() or ("*" in ids and silent) or not silent.isdisjoint(ids):
                event.clear()
                yield "event: changed\ndata:\n\n"
                await asyncio.sleep(PAUSE)
