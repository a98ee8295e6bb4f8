"""HTTP for the service: paths, statuses, headers. Owns no rule; that every path needs a token is `Guard`'s.

`api` makes the FastAPI application; OpenAPI is at /openapi.json, for whoever has a token. Routes have the names of the
service's methods.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Annotated

from fastapi import APIRouter, Body, Depends, FastAPI, Request, Response
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool

from .. import __version__, ids
from .. import bodies as b
from ..errors import CODES
from . import exposition
from .changes import Changes
from .console.routes import console
from .guard import Ascii, Guard, handlers
from .oidc import Provider
from .rules import JSON, Caller
from .service import Service


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


Does = Annotated[Service, Depends(_service)]
Who = Annotated[Caller, Depends(_caller)]
BYTES = "application/octet-stream"
LOGS_WAIT = 5.0  # seconds for a node to send the output of a running session: its heartbeat and a little
FAILURE = {  # in place of FastAPI's own 422
    "description": "What failed, and what to do next",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["code", "error", "message", "hint"],
                "properties": {
                    "code": {"type": "integer", "description": "the HTTP status"},
                    "error": {"type": "string", "enum": list(CODES)},
                    "message": {"type": "string"},
                    "hint": {"type": "string"},
                },
            }
        }
    },
}
router = APIRouter(
    prefix="/api/v3", dependencies=[Depends(HTTPBearer(auto_error=False))], responses={"default": FAILURE}
)


def api(service: Service, provider: Provider | None = None) -> FastAPI:
    """The application. provider: through which people may sign in to the console.

    The pages that FastAPI would serve for people load scripts from elsewhere, so there are none.
    """
    app = FastAPI(
        title="Beaker Sessions",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        default_response_class=Ascii,
        exception_handlers=handlers(),
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.service = service
    app.include_router(router)
    app.add_api_route("/healthz", healthy, response_model=None)
    app.add_api_route("/metrics", metrics, include_in_schema=False, response_model=None)
    app.state.changes = Changes()
    app.add_middleware(Guard, service=service, console=console(service, app.state.changes, provider))
    return app


def healthy(does: Does) -> JSON:
    does.healthy()
    return {"status": "ok", "version": __version__, "epoch": does.store.epoch}


def metrics(does: Does, who: Who) -> Response:
    """For Prometheus, which sends an administrator's token as its `authorization`.

    Not for the loopback alone: behind a proxy everybody comes from there.
    """
    return Response(does.exposition(who), media_type=exposition.TYPE)


@router.get("/user")
def whoami(does: Does, who: Who) -> JSON:
    return does.whoami(who)


@router.get("/user/orgs")
def list_organizations(does: Does, who: Who) -> JSON:
    return does.list_organizations(who)


@router.get("/orgs/{org}")
def get_organization(does: Does, who: Who, org: str) -> JSON:
    return does.get_organization(who, org)


@router.get("/orgs/{org}/members")
def list_members(does: Does, who: Who, org: str) -> JSON:
    return does.list_members(who, org)


@router.get("/auth/tokens")
def list_tokens(does: Does, who: Who, account: str | None = None) -> JSON:
    return does.list_tokens(who, account=account)


@router.post("/auth/tokens", status_code=201)
def create_token(does: Does, who: Who, response: Response, body: b.TokenBody | None = None) -> JSON:
    answer = does.create_token(who, body)
    if body is None:  # as clients of the original ask, who take it from this cookie
        response.set_cookie("User-Token", answer["token"], path="/", secure=True, httponly=True, samesite="strict")
    return answer


@router.delete("/auth/tokens/{id}", status_code=204)
def revoke_token(does: Does, who: Who, id: str) -> None:
    does.revoke_token(who, id)


@router.post("/auth/links", status_code=201)
def create_link(does: Does, who: Who) -> JSON:
    return does.create_link(who)


@router.get("/users/{account}")
def get_account(does: Does, who: Who, account: str) -> JSON:
    return does.get_account(who, account)


@router.get("/admin/users")
def list_accounts(does: Does, who: Who) -> JSON:
    return does.list_accounts(who)


@router.post("/admin/users", status_code=201)
def create_account(does: Does, who: Who, body: b.AccountBody) -> JSON:
    return does.create_account(who, body)


@router.get("/workspaces")
def list_workspaces(does: Does, who: Who) -> JSON:
    return does.list_workspaces(who)


@router.post("/workspaces", status_code=201)
def create_workspace(does: Does, who: Who, body: b.WorkspaceBody) -> JSON:
    return does.create_workspace(who, body)


# The longer paths come first: a workspace's reference may hold a slash, encoded or not.
@router.get("/workspaces/{workspace:path}/secrets/{name}/value", response_class=Response)
def read_secret(does: Does, who: Who, workspace: str, name: str) -> Response:
    value = does.read_secret(who, workspace, name)
    return Response(value, media_type="application/octet-stream", headers={"Cache-Control": "no-store"})


@router.put("/workspaces/{workspace:path}/secrets/{name}/value")
def write_secret(
    does: Does, who: Who, workspace: str, name: str, value: Annotated[bytes, Body(media_type=BYTES)] = b""
) -> JSON:
    return does.write_secret(who, workspace, name, value)


@router.get("/workspaces/{workspace:path}/secrets/{name}")
def get_secret(does: Does, who: Who, workspace: str, name: str) -> JSON:
    return does.get_secret(who, workspace, name)


@router.delete("/workspaces/{workspace:path}/secrets/{name}", status_code=204)
def delete_secret(does: Does, who: Who, workspace: str, name: str) -> None:
    does.delete_secret(who, workspace, name)


@router.get("/workspaces/{workspace:path}/secrets")
def list_secrets(does: Does, who: Who, workspace: str) -> JSON:
    return does.list_secrets(who, workspace)


@router.get("/workspaces/{workspace:path}")
def get_workspace(does: Does, who: Who, workspace: str) -> JSON:
    return does.get_workspace(who, workspace)


@router.patch("/workspaces/{workspace:path}")
def update_workspace(does: Does, who: Who, workspace: str, body: b.WorkspacePatch) -> JSON:
    return does.update_workspace(who, workspace, body)


@router.get("/admin/audit")
def list_audit(does: Does, who: Who, text: str = "", cursor: str | None = None, limit: int = 100) -> JSON:
    return does.list_audit(who, text=text, cursor=cursor, limit=limit)


@router.get("/clusters/{org}")
def list_clusters(does: Does, who: Who, org: str) -> JSON:
    """The clusters of an organization; with the id of a cluster, that cluster."""
    if ids.is_ulid(org) and does.is_cluster(org):
        return does.get_cluster(who, org)
    return does.list_clusters(who, org)


@router.post("/clusters/{org}", status_code=201)
def create_cluster(does: Does, who: Who, org: str, body: b.ClusterBody) -> JSON:
    return does.create_cluster(who, org, body)


@router.get("/clusters/{org}/{name}")
def get_cluster(does: Does, who: Who, org: str, name: str) -> JSON:
    return does.get_cluster(who, f"{org}/{name}")


@router.patch("/clusters/{org}/{name}")
def update_cluster(does: Does, who: Who, org: str, name: str, body: b.ClusterPatch) -> JSON:
    return does.update_cluster(who, f"{org}/{name}", body)


@router.delete("/clusters/{org}/{name}", status_code=204)
def delete_cluster(does: Does, who: Who, org: str, name: str) -> None:
    does.delete_cluster(who, f"{org}/{name}")


@router.get("/clusters/{org}/{name}/nodes")
def list_nodes(does: Does, who: Who, org: str, name: str) -> JSON:
    return does.list_nodes(who, f"{org}/{name}")


@router.post("/clusters/{org}/{name}/nodes", status_code=201)
def register_node(does: Does, who: Who, org: str, name: str, body: b.NodeBody) -> JSON:
    return does.register_node(who, f"{org}/{name}", body)


@router.get("/nodes/{node}")
def get_node(does: Does, who: Who, node: str) -> JSON:
    return does.get_node(who, node)


@router.patch("/nodes/{node}")
def update_node(does: Does, who: Who, node: str, body: b.NodePatch) -> JSON:
    return does.update_node(who, node, body)


@router.delete("/nodes/{node}", status_code=204)
def delete_node(does: Does, who: Who, node: str) -> None:
    does.delete_node(who, node)


@router.post("/nodes/{node}/heartbeat")
def heartbeat(does: Does, who: Who, node: str, body: b.Heartbeat) -> JSON:
    return does.heartbeat(who, node, body)


@router.get("/nodes/{node}/metrics")
def node_metrics(does: Does, who: Who, node: str, hours: float = 24.0) -> JSON:
    return does.node_metrics(who, node, hours=hours)


@router.get("/jobs")
def list_jobs(
    does: Does,
    who: Who,
    kind: str | None = None,
    node: str | None = None,
    cluster: str | None = None,
    author: str | None = None,
    finalized: bool | None = None,
    scheduled: bool | None = None,
    cursor: str | None = None,
    limit: int = 100,
) -> JSON:
    filters = {"kind": kind, "node": node, "cluster": cluster, "author": author, "cursor": cursor}
    return does.list_jobs(who, **filters, finalized=finalized, scheduled=scheduled, limit=limit)


@router.post("/jobs", status_code=201)
def create_job(does: Does, who: Who, body: b.JobBody) -> JSON:
    return does.create_job(who, body)


@router.get("/jobs/{id}")
def get_job(does: Does, who: Who, id: str) -> JSON:
    return does.get_job(who, id)


@router.patch("/jobs/{id}")
def update_job(does: Does, who: Who, id: str, body: b.JobPatch) -> JSON:
    return does.update_job(who, id, body)


@router.put("/jobs/{id}")
def report_job(does: Does, who: Who, id: str, body: JSON) -> JSON:
    return does.report_job(who, id, body)


@router.get("/jobs/{id}/logs", response_class=Response)
async def get_logs(request: Request, does: Does, who: Who, id: str) -> Response:
    """Of a running session, what its node answers to being asked, at its next heartbeat, or else what it sent last."""
    output = await run_in_threadpool(does.get_logs, who, id)
    await request.state.turn.aclose()  # what follows waits, and asks little
    until = time.monotonic() + LOGS_WAIT
    with request.app.state.changes.watch([id], who.account_id) as event:
        while event and (left := until - time.monotonic()) > 0 and await run_in_threadpool(does.logs_due, id):
            with suppress(TimeoutError):
                await asyncio.wait_for(event.wait(), min(left, 1.0))
            event.clear()
            output = await run_in_threadpool(does.get_logs, who, id)
    return Response(output, media_type=BYTES)


@router.get("/jobs/{id}/metrics")
def job_metrics(does: Does, who: Who, id: str) -> JSON:
    return does.job_metrics(who, id)


@router.put("/jobs/{id}/logs", status_code=204)
def put_logs(
    does: Does, who: Who, id: str, output: Annotated[bytes, Body(media_type="application/octet-stream")]
) -> None:
    does.put_logs(who, id, output)
