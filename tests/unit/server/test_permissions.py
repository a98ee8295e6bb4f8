"""Every route of the OpenAPI document, asked by everybody: a route that is not in the table fails the test."""

from __future__ import annotations

import http.client
import json
from types import SimpleNamespace
from typing import Any

import pytest

from beaker_sessions import model, wire
from beaker_sessions.ids import ulid

from .conftest import LIMITS

WHO = ("nobody", "bob", "ann", "root", "executor", "stranger", "inside")
EVERYBODY = (401, 200, 200, 200, 200, 200, 200)
USERS = (401, 200, 200, 200, 403, 403, 403)
PERSONS = (401, 200, 200, 200, 403, 403, 200)
ADMIN = (401, 403, 403, 200, 403, 403, 403)
NODE = (401, 403, 403, 403, 200, 403, 403)
NODE_OR_ADMIN = (401, 403, 403, 200, 200, 403, 403)
AUTHOR = (401, 403, 200, 200, 403, 403, 200)
AUTHOR_ALONE = (401, 403, 200, 403, 403, 403, 200)
AUTHOR_OUTSIDE = (401, 403, 200, 403, 403, 403, 403)
PUBLIC = (200,) * 7

# method and path -> (statuses in the order of WHO, 200 standing for any success, body). The session is ann's, on the
# node of `executor`; `stranger` is the executor of another node, `inside` the
# session's own token.
TABLE: dict[tuple[str, str], tuple[tuple[int, ...], Any]] = {
    ("get", "/healthz"): (PUBLIC, None),
    ("get", "/api/v3/user"): (EVERYBODY, None),
    ("get", "/api/v3/user/orgs"): (EVERYBODY, None),
    ("get", "/api/v3/orgs/{org}"): (EVERYBODY, None),
    ("get", "/api/v3/orgs/{org}/members"): (EVERYBODY, None),
    ("get", "/api/v3/auth/tokens"): (EVERYBODY, None),
    ("post", "/api/v3/auth/tokens"): (USERS, {"name": "other"}),
    ("post", "/api/v3/auth/links"): (USERS, None),
    ("delete", "/api/v3/auth/tokens/{id}"): ((401, 404, 200, 200, 403, 403, 403), None),
    ("get", "/api/v3/users/{account}"): (EVERYBODY, None),
    ("get", "/api/v3/admin/users"): (ADMIN, None),
    ("get", "/api/v3/admin/audit"): (ADMIN, None),
    ("post", "/api/v3/admin/users"): (ADMIN, {"name": "carl"}),
    ("get", "/api/v3/workspaces"): (PERSONS, None),
    ("post", "/api/v3/workspaces"): (USERS, {"name": "more"}),
    ("get", "/api/v3/workspaces/{workspace}"): (AUTHOR_ALONE, None),
    ("patch", "/api/v3/workspaces/{workspace}"): (AUTHOR_OUTSIDE, {"archive": False}),
    ("get", "/api/v3/workspaces/{workspace}/secrets"): (AUTHOR_ALONE, None),
    ("get", "/api/v3/workspaces/{workspace}/secrets/{name}"): (AUTHOR_ALONE, None),
    ("delete", "/api/v3/workspaces/{workspace}/secrets/{name}"): ((401, 403, 200, 403, 403, 403, 404), None),
    ("get", "/api/v3/workspaces/{workspace}/secrets/{name}/value"): (AUTHOR_ALONE, None),
    ("put", "/api/v3/workspaces/{workspace}/secrets/{name}/value"): (AUTHOR_OUTSIDE, b"value"),
    ("get", "/api/v3/clusters/{org}"): (EVERYBODY, None),
    ("post", "/api/v3/clusters/{org}"): (ADMIN, {"name": "second"}),
    ("get", "/api/v3/clusters/{org}/{name}"): (EVERYBODY, None),
    ("patch", "/api/v3/clusters/{org}/{name}"): (ADMIN, {"capacity": 3}),
    ("delete", "/api/v3/clusters/{org}/{name}"): (ADMIN, None),
    ("get", "/api/v3/clusters/{org}/{name}/nodes"): (EVERYBODY, None),
    ("post", "/api/v3/clusters/{org}/{name}/nodes"): ((401, 403, 403, 403, 200, 409, 403), "register"),
    ("get", "/api/v3/nodes/{node}"): (EVERYBODY, None),
    ("patch", "/api/v3/nodes/{node}"): (NODE_OR_ADMIN, {"cordoned": False}),
    ("delete", "/api/v3/nodes/{node}"): (ADMIN, None),
    ("post", "/api/v3/nodes/{node}/heartbeat"): (NODE, "heartbeat"),
    ("get", "/api/v3/nodes/{node}/metrics"): (EVERYBODY, None),
    ("get", "/api/v3/jobs/{id}/metrics"): (EVERYBODY, None),
    ("get", "/api/v3/jobs"): (EVERYBODY, None),
    ("post", "/api/v3/jobs"): (USERS, {"session": {"node": "gpu-1"}}),
    ("get", "/api/v3/jobs/{id}"): (EVERYBODY, None),
    ("patch", "/api/v3/jobs/{id}"): (AUTHOR, {"status": {"canceled": True}}),
    ("put", "/api/v3/jobs/{id}"): (NODE, "report"),
    ("get", "/api/v3/jobs/{id}/logs"): (AUTHOR_ALONE, None),
    ("put", "/api/v3/jobs/{id}/logs"): (NODE, b"output"),
}


def call(address: str, method: str, path: str, token: str, body: Any) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    headers = {"Content-Type": kind} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        connection.request(method.upper(), path, data, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def routes(server: SimpleNamespace) -> set[tuple[str, str]]:
    status, answer = call(server.address, "get", "/openapi.json", server.ann, None)
    assert status == 200
    paths = json.loads(answer)["paths"]
    return {(method, path) for path, methods in paths.items() for method in methods}


def test_every_route_has_an_expectation(server: SimpleNamespace) -> None:
    assert routes(server) == set(TABLE)


def test_matrix(server: SimpleNamespace, node: SimpleNamespace, audited: Any) -> None:
    root = server.client(server.admin)
    for number, ((method, path), (expected, body)) in enumerate(TABLE.items()):
        session = model.Session(ulid(), "ann", node.id, model.Request(), revision=1)
        node.executor.report_job(session.id, wire.job(session))
        stranger = root.create_token({"name": "other node", "scope": "executor"})["token"]
        hostname = f"other-{number}"
        server.client(stranger).register_node("lab/main", {"hostname": hostname, "limits": {}})
        values = {"org": "lab", "name": "main", "node": node.id, "account": "ann", "id": session.id}
        if "workspaces" in path:
            workspace = server.client(server.ann).create_workspace({"name": f"notes-{number}"})["fullName"]
            server.client(server.ann).write_secret(workspace, "key", b"value")
            values |= {"workspace": workspace, "name": "key"}
        if "tokens" in path:
            values["id"] = server.client(server.ann).create_token({"name": "to revoke"})["id"]
        if method == "delete" and "clusters" in path:  # only an empty one can be deleted
            values["name"] = root.create_cluster("lab", {"name": "empty"})["name"]
        if method == "delete" and "nodes" in path:
            values["node"] = hostname
        bodies = {
            "register": {"hostname": "gpu-1", "limits": LIMITS, "instance": node.instance},
            "heartbeat": {"instance": node.instance},
            "report": wire.job(model.Session(session.id, "ann", node.id, model.Request(), revision=2, message="news")),
        }
        body = bodies[body] if isinstance(body, str) else body
        inside = server.client(server.ann).create_token({"scope": "session", "session": session.id})["token"]
        tokens = ("", server.bob, server.ann, server.admin, server.executor, stranger, inside)
        for who, token, status in zip(WHO, tokens, expected, strict=True):
            if who == "stranger" and values["node"] == hostname:
                continue  # the deletion by root just before ended this token, as it should
            before = audited()
            got, answer = call(server.address, method, path.format(**values), token, body)
            assert (200 if got < 300 else got) == status, f"{method} {path} by {who}: {got} {answer!r}"
            if got >= 400:
                said = json.loads(answer)
                assert set(said) == {"code", "error", "message", "hint"}
                assert said["code"] == got
                assert said["message"]
            if got >= 400 or method == "get":
                assert audited() == before, f"{method} {path} by {who}"


@pytest.mark.usefixtures("node")
def test_changes_are_audited(server: SimpleNamespace, audited: Any) -> None:
    """Each change that succeeds leaves exactly one audit row, in the same transaction."""
    root, ann = server.client(server.admin), server.client(server.ann)
    job = ann.create_job({"session": {"node": "gpu-1"}})["id"]
    token = ann.create_token({"name": "x"})["id"]
    for change in (
        lambda: root.create_account({"name": "dora"}),
        lambda: root.create_cluster("lab", {"name": "c"}),
        lambda: root.update_cluster("lab/c", {"capacity": 2}),
        lambda: root.delete_cluster("lab/c"),
        lambda: root.update_node("gpu-1", {"cordoned": True, "cordonReason": "fan"}),
        lambda: root.update_node("gpu-1", {"cordoned": False}),
        lambda: ann.create_job({"session": {"node": "gpu-1"}}),
        lambda: ann.update_job(job, {"status": {"canceled": True}}),
        lambda: ann.revoke_token(token),
        lambda: ann.create_token({"name": "y"}),
    ):
        before = audited()
        change()
        assert audited() == before + 1


def test_a_token_has_no_more_than_its_scope(server: SimpleNamespace) -> None:
    plain = server.client(server.admin).create_token({"name": "daily"})["token"]
    for method, path, body in (
        ("get", "/api/v3/admin/users", None),
        ("post", "/api/v3/auth/tokens", {"scope": "admin"}),
    ):
        assert call(server.address, method, path, plain, body)[0] == 403
    assert call(server.address, "post", "/api/v3/auth/tokens", server.ann, {"scope": "executor"})[0] == 403
