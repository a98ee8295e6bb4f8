"""The console's paths. Owns which page answers which path; rules are the service's, words are `pages`'.

`console` makes an ASGI application. Every path needs a signed-in browser but those in PUBLIC.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import UTC, datetime

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from ... import ids
from ...bodies import JobPatch, NodePatch, check
from ...errors import Error
from ..changes import Changes
from ..oidc import Provider
from ..service import Service
from . import administration, jobs, pages, personal, plots, templates, through
from .events import events
from .visit import HEADERS, Visit, again, begin, finish, local, receive, sign_in_first

RANGES = {"1": "1 h", "24": "24 h", "168": "7 days", "720": "30 days"}
Handler = Callable[[Visit], Response]
log = logging.getLogger(__name__)


def console(service: Service, changes: Changes, provider: Provider | None = None) -> ASGIApp:
    """provider: through which people may sign in."""
    service.store.on_commit = changes.publish

    async def live(request: Request) -> Response:
        return await events(request, service, changes)

    routes = [
        _route(service, "GET", "/", lambda visit: visit.go("/clusters")),
        _route(service, "GET", "/sign-in", sign_in_page, public=True),
        _route(service, "POST", "/sign-in", sign_in, public=True),
        _route(service, "POST", "/sign-out", sign_out, public=True),
        *(
            [
                _route(service, "GET", through.BEGIN, through.begin, public=True),
                _route(service, "GET", through.BACK, through.back, public=True),
            ]
            if provider
            else []
        ),
        _route(service, "GET", "/clusters", clusters),
        _route(service, "GET", "/cl/{org}/{name}", cluster),
        _route(service, "GET", "/node/{id}", node),
        _route(service, "POST", "/node/{id}/cordon", cordon),
        _route(service, "GET", "/job/{id}", job),
        _route(service, "POST", "/job/{id}/stop", stop),
        _route(service, "GET", "/user", personal.user),
        _route(service, "GET", "/user/tokens", lambda visit: visit.go("/user")),
        _route(service, "POST", "/user/tokens", personal.create_token),
        _route(service, "POST", "/user/tokens/{id}/revoke", personal.revoke_token),
        _route(service, "GET", "/admin", administration.admin),
        _route(service, "GET", "/admin/accounts", lambda visit: visit.go("/admin")),
        _route(service, "POST", "/admin/accounts", administration.create_account),
        _route(service, "GET", "/admin/clusters", lambda visit: visit.go("/admin")),
        _route(service, "POST", "/admin/clusters", administration.create_cluster),
        Route("/events", live),
        Route("/static/{hash}/{name}", static),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _missing(service)})
    app.state.provider = provider
    return app


def _route(service: Service, method: str, path: str, handler: Handler, public: bool = False) -> Route:
    async def endpoint(request: Request) -> Response:
        body = await request.body() if request.method == "POST" else b""
        return await run_in_threadpool(_answer, request, service, body, handler, public)

    return Route(path, endpoint, methods=[method])


def _answer(request: Request, service: Service, body: bytes, handler: Handler, public: bool) -> Response:
    """The page, or the page that says why not, with the headers that every page has."""
    visit = Visit(request, service)
    try:
        visit = begin(request, service, request.app.state.provider)
        if request.method == "POST":
            receive(visit, body)
        if visit.crossed and handler is not through.back:
            return finish(visit, again(visit))
        if visit.caller is None and not public:
            return finish(visit, sign_in_first(visit))
        return finish(visit, handler(visit))
    except Error as error:
        if error.code == "unauthorized" and visit.caller is not None and not public:
            return finish(visit, sign_in_first(visit))  # the token ended just now
        return finish(visit, problem(visit, error))
    except Exception:
        id = ids.ulid()
        log.exception("%s %s failed, error id %s", request.method, request.url.path, id)
        hint = f"tell an administrator this id: {id}"
        return finish(visit, problem(visit, Error("internal", "something unexpected happened in the server", hint)))


def _missing(service: Service) -> Callable[[Request, Exception], Response]:
    def handler(visit: Visit) -> Response:
        raise Error("not_found", f"there is no page {visit.request.url.path}", "start at the list of clusters")

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 405:
            return Response(status_code=405, headers=HEADERS | dict(error.headers or {}))
        return await run_in_threadpool(_answer, request, service, b"", handler, False)

    return answer  # type: ignore[return-value]


def problem(visit: Visit, error: Error) -> Response:
    return visit.page("problem.html", error.status, error=error)


async def static(request: Request) -> Response:
    """A file for the pages. Addresses hold the content's hash, so an answer never gets old."""
    content, type, hash = templates.files().get(request.path_params["name"], (b"", "", ""))
    if hash != request.path_params["hash"]:
        return Response(status_code=404)
    headers = {"Cache-Control": "public, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=type, headers=headers)


# signing in and out


def sign_in_page(visit: Visit) -> Response:
    if link := visit.ask("link"):
        try:
            return visit.page("link.html", link=link, account=visit.service.linked(link).account)
        except Error:
            if visit.caller is None:
                raise
            return visit.go("/clusters")  # back from where it led
    return visit.page("sign_in.html", next=local(visit.ask("next")), error=None)


def sign_in(visit: Visit) -> Response:
    if link := visit.form.get("link"):
        return visit.let_in(visit.service.redeem(link), "/clusters")
    next = local(visit.form.get("next", ""))
    try:
        secret = visit.service.sign_in(visit.form.get("token", "").strip())
    except Error as error:
        return visit.page("sign_in.html", error.status, next=next, error=error)
    return visit.let_in(secret, next)


def sign_out(visit: Visit) -> Response:
    if visit.caller is not None:
        visit.service.sign_out(visit.caller)
    return visit.go("/sign-in")


# pages


def clusters(visit: Visit) -> Response:
    service, who = visit.service, visit.who
    found = [
        pages.cluster(json, service.list_nodes(who, json["fullName"])["data"])
        for org in service.list_organizations(who)["data"]
        for json in service.list_clusters(who, org["name"])["data"]
    ]
    mine = service.list_jobs(who, author=who.account_id, finalized=False, limit=50)["data"]
    silent = pages.silent_nodes(service.get_node(who, node) for node in {one["node"] for one in mine})
    own = [jobs.job(one, who.account_id, datetime.now(UTC), one["node"] in silent) for one in mine]
    return visit.page("clusters.html", clusters=found, sessions=own, watch="*")


def cluster(visit: Visit) -> Response:
    service, who, now = visit.service, visit.who, datetime.now(UTC)
    ref = f"{visit.request.path_params['org']}/{visit.request.path_params['name']}"
    json = service.get_cluster(who, ref)
    every = service.list_nodes(who, ref)["data"]
    text, show, sort = visit.ask("q")[:100], visit.ask("show", "all"), visit.ask("sort", "name")
    chosen = pages.choose(every, text, show, sort)
    last = max(1, -(-len(chosen) // pages.PAGE))
    asked = visit.ask("page", "1")[:9]
    number = min(max(1, int(asked) if asked.isdecimal() else 1), last)
    shown = chosen[(number - 1) * pages.PAGE : number * pages.PAGE]
    usage = service.usage(who, [one["id"] for one in shown])
    holding: dict[str, list[pages.JSON]] = {}
    nodes = [one["id"] for one in shown]
    for job in service.list_jobs(who, nodes=nodes, finalized=False, scheduled=True, limit=1000)["data"]:
        holding.setdefault(job["node"], []).append(job)
    return visit.page(
        "cluster.html",
        watch=json["id"],
        cluster=pages.cluster(json, every),
        nodes=[
            pages.node(one, holding.get(one["id"], ()), who.account_id, now, usage.get(one["id"], {}).get("gpus"))
            for one in shown
        ],
        found=len(chosen),
        number=number,
        last=last,
        query={
            "q": text,
            "show": show if show in pages.SHOWS else "all",
            "sort": sort if sort in pages.SORTS else "name",
        },
        sorts=pages.SORTS,
        shows=pages.SHOWS,
    )


def node(visit: Visit) -> Response:
    service, who, now = visit.service, visit.who, datetime.now(UTC)
    json = service.get_node(who, visit.request.path_params["id"])
    live = service.list_jobs(who, node=json["id"], finalized=False, limit=1000)["data"]
    waiting = [job for job in live if not job["status"].get("scheduled")]
    silent, me = json["status"] == "not reporting", who.account_id
    used = service.usage(who, [json["id"]]).get(json["id"], {})
    use = used.get("sessions", {})
    hours = visit.ask("hours") if visit.ask("hours") in RANGES else "24"
    end = now.timestamp()
    answer = service.node_metrics(who, json["id"], hours=float(hours))
    return visit.page(
        "node.html",
        watch=json["id"],
        node=pages.node(json, live, me, now, used.get("gpus")),
        charts=plots.of_node(json, answer, end - 3600 * float(hours), end, used),
        hours=hours,
        ranges=RANGES,
        jobs=[
            jobs.job(job, me, now, silent, used=use.get(job["id"]))
            for job in reversed(live)
            if job["status"].get("scheduled")
        ],
        queue=jobs.queue(waiting, pages.free_gpus(json), me, now, closed(json)),
    )


def closed(node: pages.JSON) -> str:
    """Why a node starts nothing new, "" when it does."""
    return (node["cordonReason"] or "no reason was given") if node["cordoned"] else ""


def cordon(visit: Visit) -> Response:
    """Set or lift it, as the form's `cordoned` says."""
    node, cordoned = visit.request.path_params["id"], visit.form.get("cordoned") == "yes"
    body = {"cordoned": cordoned, "cordonReason": visit.form.get("reason", "")} if cordoned else {"cordoned": False}
    visit.service.update_node(visit.who, node, check(NodePatch, body))
    return visit.go(f"/node/{node}")


def job(visit: Visit) -> Response:
    service, who, now = visit.service, visit.who, datetime.now(UTC)
    json = service.get_job(who, visit.request.path_params["id"])
    live, output = not json["status"].get("finalized"), None
    place, reason, silent = 0, "", False
    if live:
        home = service.get_node(who, json["node"])
        silent = home["status"] == "not reporting"
        waiting = service.list_jobs(who, node=json["node"], finalized=False, scheduled=False, limit=1000)["data"]
        for one in jobs.queue(waiting, pages.free_gpus(home), who.account_id, now, closed(home)):
            if one.id == json["id"]:
                place, reason = one.place, one.reason
    view = jobs.job(json, who.account_id, now, silent, place, reason)
    if view.mine and (json["status"].get("started") or not live):
        output = jobs.output(service.get_logs(who, view.id))
    charts = []
    if begin := json["status"].get("scheduled"):
        until = json["status"].get("exited") or json["status"].get("finalized")
        start = datetime.fromisoformat(begin).timestamp()
        end = max(start + 10, (datetime.fromisoformat(until) if until else now).timestamp())
        used = None if until else service.usage(who, [view.node]).get(view.node, {})
        charts = plots.of_job(json, service.job_metrics(who, view.id), start, end, used)
    return visit.page(
        "job.html",
        job=view,
        charts=charts,
        output=output,
        may_stop=view.live and (view.mine or who.admin),
        watch=f"{view.id},{view.node}" if live else view.id,
    )


def stop(visit: Visit) -> Response:
    id, who = visit.request.path_params["id"], visit.who.account
    reason = visit.form.get("reason", "").strip() or f"stopped by {who} in the console"
    visit.service.update_job(visit.who, id, check(JobPatch, {"status": {"canceled": True, "canceledFor": reason}}))
    return visit.go(f"/job/{id}")
