"""The administrators' page: accounts, clusters, and the audit log with search."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from ...bodies import AccountBody, ClusterBody, check
from ...errors import Error
from . import pages
from .visit import Visit

TYPED = ("name", "display", "email", "admin")  # what is kept when it is refused


def admin(visit: Visit) -> Response:
    return _page(visit)


def create_account(visit: Visit) -> Response:
    """The account's first token is in this answer and nowhere else."""
    form = visit.form
    body = {"name": form.get("name", "").strip(), "role": "admin" if form.get("admin") else "user"}
    body |= {key: form[field] for key, field in (("displayName", "display"), ("email", "email")) if form.get(field)}
    try:
        made = visit.service.create_account(visit.once, check(AccountBody, body))
    except Error as error:
        visit.who.need_admin()  # who is none is not shown the page
        return _page(visit, error.status, error=error)
    return _page(visit, made=made)


def create_cluster(visit: Visit) -> Response:
    org, name = visit.form.get("org", ""), visit.form.get("name", "").strip()
    try:
        visit.service.create_cluster(visit.who, org, check(ClusterBody, {"name": name}))
    except Error as error:
        visit.who.need_admin()
        return _page(visit, error.status, error=error)
    return visit.go("/admin")


def _page(visit: Visit, status: int = 200, **values: Any) -> Response:
    service, who = visit.service, visit.who
    accounts = service.list_accounts(who)["data"]
    organizations = service.list_organizations(who)["data"]
    clusters = [
        pages.cluster(one, service.list_nodes(who, one["fullName"])["data"])
        for org in organizations
        for one in service.list_clusters(who, org["name"])["data"]
    ]
    text, cursor = visit.ask("q")[:100], visit.ask("before") or None
    audit = service.list_audit(who, text=text, cursor=cursor, limit=50)
    return visit.page(
        "admin.html",
        status,
        accounts=accounts,
        organizations=organizations,
        clusters=clusters,
        audit=[one | {"details": _details(one["details"])} for one in audit["data"]],
        older=audit.get("nextCursor"),
        text=text,
        made=values.get("made"),
        error=values.get("error"),
        at="/admin",
        typed={name: visit.form.get(name, "") if values.get("error") else "" for name in TYPED},
    )


def _details(details: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in details.items()
    )
