"""The page of one's own account: its tokens and its latest sessions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from starlette.responses import Response

from ...bodies import TokenBody, check
from ...errors import Error
from . import jobs, pages
from .visit import Visit

SESSIONS = 20
LIVES = {"7d": "7 days", "30d": "30 days", "90d": "90 days", "365d": "a year", "": "for ever"}
SCOPES = {"user": "act as me", "executor": "run a node", "admin": "administer"}


def user(visit: Visit) -> Response:
    return _page(visit)


def create_token(visit: Visit) -> Response:
    """The token is in this answer and nowhere else."""
    form = visit.form
    wanted = {"name": form.get("name", "").strip(), "scope": form.get("scope", "user")}
    try:
        body = check(TokenBody, wanted | ({"expiry": form["expiry"]} if form.get("expiry") else {}))
        made = visit.service.create_token(visit.once, body)
    except Error as error:
        return _page(visit, error.status, error=error)
    return _page(visit, made=made)


def revoke_token(visit: Visit) -> Response:
    visit.service.revoke_token(visit.who, visit.request.path_params["id"])
    return visit.go("/user")


def _page(visit: Visit, status: int = 200, **values: Any) -> Response:
    service, who, now = visit.service, visit.who, datetime.now(UTC)
    found = service.list_jobs(who, author=who.account_id, limit=SESSIONS)["data"]
    live = {one["node"] for one in found if not one["status"].get("finalized")}
    silent = pages.silent_nodes(service.get_node(who, node) for node in live)
    tokens = [
        token | {"age": pages.ago(token["created"], now), "left": pages.left(token.get("expiry"), now)}
        for token in service.list_tokens(who)["data"]
    ]
    return visit.page(
        "user.html",
        status,
        account=service.whoami(who),
        tokens=tokens,
        sessions=[jobs.job(one, who.account_id, now, one["node"] in silent) for one in found],
        scopes=SCOPES if who.admin else {"user": SCOPES["user"]},
        lives=LIVES,
        made=values.get("made"),
        error=values.get("error"),
        watch=who.account_id,
        at="/user",
    )
