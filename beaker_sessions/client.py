"""The REST client of executor and command line. Its method names are those of `server.service`.

Owns connections, retries and the translation of failures into `errors.Error`; that nobody else answers is `transport`'s
matter. Must import nothing but the standard library, `errors` and `transport`, and must run on Python 3.9: the command
line loads it. Answers are the JSON of the REST API, not validated: they come from the server that the user chose.

A request that meets a closed connection is sent again, which is safe for all of them: creates carry an idempotency key,
and everything else sets a value.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

from .errors import Error
from .transport import Endpoint

JSON = dict[str, Any]


class Client:
    """One server, as one account. Safe to use from several threads.

    server: where it is; an address alone is reached as `Endpoint` does by default. timeout: seconds, for each wait on
    the network.
    """

    def __init__(self, server: Endpoint | str, token: str = "", timeout: float = 10.0) -> None:
        self._server = Endpoint(server) if isinstance(server, str) else server
        if not token.isascii() or not token.isprintable():
            raise Error("unauthorized", "the token contains characters that no token has", "copy it again")
        self.address = self._server.address
        self.token = token
        self.timeout = timeout
        self._base = self._server.path + "/api/v3/"
        self._idle: list[http.client.HTTPConnection] = []

    def close(self) -> None:
        """Close the idle connections; the next call opens a new one."""
        while self._idle:
            self._idle.pop().close()

    def epoch(self) -> str:
        """Of the server's database: another one after it was restored, or when it is another database."""
        return str(self._decode(self._call("GET", "/healthz")).get("epoch") or "")

    # accounts

    def whoami(self) -> JSON:
        return self._json("GET", "user")

    def list_organizations(self) -> JSON:
        return self._json("GET", "user/orgs")

    def get_organization(self, org: str) -> JSON:
        return self._json("GET", f"orgs/{_part(org)}")

    def list_members(self, org: str) -> JSON:
        return self._json("GET", f"orgs/{_part(org)}/members")

    def get_account(self, account: str) -> JSON:
        return self._json("GET", f"users/{_part(account)}")

    def list_accounts(self) -> JSON:
        return self._json("GET", "admin/users")

    def create_account(self, body: JSON, key: str = "") -> JSON:
        """The account, with its first token in `token`."""
        return self._create("admin/users", body, key)

    def list_audit(self, text: str = "", cursor: str = "") -> JSON:
        """One page of what was changed, newest first: for administrators."""
        return self._json("GET", "admin/audit?" + urlencode({"text": text} | ({"cursor": cursor} if cursor else {})))

    def list_tokens(self, *, account: str | None = None) -> JSON:
        """One's own tokens, or for administrators those of another account."""
        return self._json("GET", "auth/tokens" + ("" if account is None else f"?account={_part(account)}"))

    def create_token(self, body: JSON | None = None, key: str = "") -> JSON:
        """Without a body: a new token for this one, which ends. With one: another token, of that name and scope."""
        return self._create("auth/tokens", body, key)

    def revoke_token(self, id: str) -> None:
        self._json("DELETE", f"auth/tokens/{_part(id)}")

    def create_link(self) -> JSON:
        """A `path` of the console that signs one browser in, once."""
        return self._json("POST", "auth/links")

    # clusters and nodes

    def list_clusters(self, org: str) -> JSON:
        return self._json("GET", f"clusters/{_part(org)}")

    def create_cluster(self, org: str, body: JSON, key: str = "") -> JSON:
        return self._create(f"clusters/{_part(org)}", body, key)

    def get_cluster(self, cluster: str) -> JSON:
        """cluster: `org/name` or an id, here and below."""
        return self._json("GET", f"clusters/{_path(cluster)}")

    def update_cluster(self, cluster: str, body: JSON) -> JSON:
        return self._json("PATCH", f"clusters/{_path(cluster)}", body)

    def delete_cluster(self, cluster: str) -> None:
        self._json("DELETE", f"clusters/{_path(cluster)}")

    def list_nodes(self, cluster: str) -> JSON:
        return self._json("GET", f"clusters/{_path(cluster)}/nodes")

    def register_node(self, cluster: str, body: JSON) -> JSON:
        """For executors. body: hostname, limits, instance."""
        return self._create(f"clusters/{_path(cluster)}/nodes", body, "")

    def get_node(self, node: str) -> JSON:
        """node: an id or a hostname, here and below."""
        return self._json("GET", f"nodes/{_part(node)}")

    def update_node(self, node: str, body: JSON) -> JSON:
        return self._json("PATCH", f"nodes/{_part(node)}", body)

    def delete_node(self, node: str) -> None:
        self._json("DELETE", f"nodes/{_part(node)}")

    def heartbeat(self, node: str, body: JSON) -> JSON:
        """For executors. body: instance, version, free, queue. Raises Error conflict when a newer instance is there."""
        return self._json("POST", f"nodes/{_part(node)}/heartbeat", body)

    def node_metrics(self, node: str, hours: float = 24.0) -> JSON:
        """What a node used: step in seconds, and points with what is known of node, gpus and sessions."""
        return self._json("GET", f"nodes/{_part(node)}/metrics?hours={hours:g}")

    # jobs

    def list_jobs(self, **filters: str | bool | int | None) -> JSON:
        """One page. filters: kind, node, cluster, author, finalized, scheduled, cursor, limit."""
        query = {key: str(value).lower() if isinstance(value, bool) else value for key, value in filters.items()}
        return self._json("GET", "jobs?" + urlencode({key: value for key, value in query.items() if value is not None}))

    def create_job(self, body: JSON, key: str = "") -> JSON:
        return self._create("jobs", body, key)

    def get_job(self, id: str) -> JSON:
        return self._json("GET", f"jobs/{_part(id)}")

    def update_job(self, id: str, body: JSON) -> JSON:
        return self._json("PATCH", f"jobs/{_part(id)}", body)

    def report_job(self, id: str, body: JSON) -> JSON:
        """For executors. body: a whole job with its revision."""
        return self._json("PUT", f"jobs/{_part(id)}", body)

    def job_metrics(self, id: str) -> JSON:
        """What a session used: step in seconds, and points with cpu, memory and gpus, as far as known."""
        return self._json("GET", f"jobs/{_part(id)}/metrics")

    def get_logs(self, id: str) -> bytes:
        return self._call("GET", f"jobs/{_part(id)}/logs")

    def put_logs(self, id: str, output: bytes) -> None:
        """For executors. output: the last 1 MiB of it."""
        self._call("PUT", f"jobs/{_part(id)}/logs", output, {"Content-Type": "application/octet-stream"})

    # workspaces and secrets

    def list_workspaces(self) -> JSON:
        return self._json("GET", "workspaces")

    def create_workspace(self, body: JSON, key: str = "") -> JSON:
        return self._create("workspaces", body, key)

    def get_workspace(self, workspace: str) -> JSON:
        """workspace: `owner/name`, the name of one's own, or an id, here and below."""
        return self._json("GET", f"workspaces/{_path(workspace)}")

    def update_workspace(self, workspace: str, body: JSON) -> JSON:
        return self._json("PATCH", f"workspaces/{_path(workspace)}", body)

    def list_secrets(self, workspace: str) -> JSON:
        return self._json("GET", f"workspaces/{_path(workspace)}/secrets")

    def get_secret(self, workspace: str, name: str) -> JSON:
        return self._json("GET", f"workspaces/{_path(workspace)}/secrets/{_part(name)}")

    def read_secret(self, workspace: str, name: str) -> bytes:
        return self._call("GET", f"workspaces/{_path(workspace)}/secrets/{_part(name)}/value")

    def write_secret(self, workspace: str, name: str, value: bytes) -> JSON:
        path = f"workspaces/{_path(workspace)}/secrets/{_part(name)}/value"
        return self._decode(self._call("PUT", path, value, {"Content-Type": "application/octet-stream"}))

    def delete_secret(self, workspace: str, name: str) -> None:
        self._json("DELETE", f"workspaces/{_path(workspace)}/secrets/{_part(name)}")

    # plumbing

    def forward(self, method: str, path: str, body: bytes | None, headers: JSON) -> bytes:
        """The answer to somebody else's request. path: below `/api/v3/`, percent-encoded."""
        return self._call(method, path, body, headers)

    def jobs(self, **filters: str | bool | int | None) -> Iterator[JSON]:
        """Every job of every page."""
        while True:
            page = self.list_jobs(**filters)
            yield from page["data"]
            if not page.get("next"):
                return
            filters["cursor"] = page["next"]

    def _create(self, path: str, body: JSON | None, key: str) -> JSON:
        return self._json("POST", path, body, {"Idempotency-Key": key or os.urandom(16).hex()})

    def _json(self, method: str, path: str, body: JSON | None = None, headers: JSON | None = None) -> JSON:
        data = None if body is None else json.dumps(body).encode()
        answer = self._call(method, path, data, {"Content-Type": "application/json", **(headers or {})})
        return self._decode(answer) if answer else {}

    def _call(self, method: str, path: str, body: bytes | None = None, headers: JSON | None = None) -> bytes:
        headers = {"Accept": "application/json", **(headers or {})}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                connection = self._server.connection(self.timeout)
            fresh = connection.sock is None
            try:
                whole = self._server.path + path if path.startswith("/") else self._base + path
                connection.request(method, whole, body, headers)
                response = connection.getresponse()
                answer = response.read()
            except (OSError, UnicodeError, http.client.HTTPException) as error:
                connection.close()
                # A connection that was kept may have been closed meanwhile, which says nothing about the server.
                if not fresh and not isinstance(error, TimeoutError):
                    continue
                reason = f"no server answers at {self.address}: {_reason(error)}"
                raise Error("unavailable", reason, "is beaker-server running, and the address right?") from error
            except Error:
                connection.close()
                raise
            self._idle.append(connection)
            break
        if response.status < 400:
            return answer
        said = self._decode(answer)
        if "message" not in said:
            said = {
                "message": f"{self.address} answered {response.status} {response.reason}",
                "hint": "is this the address of a Beaker server?",
            }
        raise Error.from_dict({"code": response.status, **said})

    def _decode(self, answer: bytes) -> JSON:
        try:
            value = json.loads(answer)
        except ValueError:
            value = None
        return value if isinstance(value, dict) else {}


def _part(text: str) -> str:
    """One part of a path. Raises Error invalid for what no server takes for one, however it is written."""
    if "/" in text or text in ("", ".", ".."):
        raise Error("invalid", f"{text!r} is not a name", "names are letters, digits, '_', '.' and '-'")
    return quote(text, safe="")


def _path(reference: str) -> str:
    """Of a cluster or a workspace, which may be `org/name`."""
    return "/".join(_part(part) for part in reference.split("/", 1))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
