"""The server as the command line asks it: for what this machine's executor does not know, or when there is none.

Owns choosing a client and the questions that several commands share. Loads an HTTP client: never import it on the way
to a session.
"""

from __future__ import annotations

import base64
import os

from ..client import Client
from ..errors import Error
from ..transport import Endpoint
from . import config, door
from .session import require_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def client(settings: config.Config, timeout: float = 10.0) -> Client:
    """The server as the user is logged in to it, or as their session may ask it. Raises Error unauthorized when not."""
    if door.inside():
        return Inside("https://session")  # which is never connected to
    server = Endpoint(settings.address, os.path.dirname(door.path()), settings.insecure_addresses)
    return Client(server, require_token(settings), timeout)


class Inside(Client):
    """The server, asked from inside a session through the session's own socket: nobody logs in there."""

    def _call(self, method: str, path: str, body: bytes | None = None, headers: dict[str, Any] | None = None) -> bytes:
        encoded = None if body is None else base64.b64encode(body).decode()
        kind = (headers or {}).get("Content-Type")
        answer = door.ask("rest", "", method=method, path=path, body=encoded, type=kind)
        return base64.b64decode(answer["body"])


def organization(settings: config.Config, server: Client) -> str:
    """The default organization, else the user's only one."""
    if settings.get("default_org"):
        return settings.get("default_org")
    names = [str(org["name"]) for org in server.list_organizations()["data"]]
    if len(names) != 1:
        raise Error("invalid", f"which organization? Yours are: {', '.join(names) or 'none'}", "name one")
    return names[0]


def nodes(server: Client, cluster: str | None = None) -> list[dict[str, Any]]:
    """The nodes of one cluster, or of all clusters of all of the user's organizations."""
    if cluster:
        found: list[dict[str, Any]] = server.list_nodes(cluster)["data"]
        return found
    clusters = [
        each["fullName"]
        for org in server.list_organizations()["data"]
        for each in server.list_clusters(org["name"])["data"]
    ]
    return [node for name in clusters for node in server.list_nodes(name)["data"]]


def hostnames(settings: config.Config) -> list[str]:
    """Where sessions could be started, [] when the server does not say: for hints, so it never fails."""
    try:
        return [str(node["hostname"]) for node in nodes(client(settings, timeout=3.0)) if not node.get("cordoned")]
    except Error:
        return []
