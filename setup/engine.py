"""Docker Engine: starting it, and the few calls of its API that set-up needs. Knows nothing of images' contents.

The API: https://docs.docker.com/engine/api/v1.40/
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import daemon, driver, host, packages
from .steps import Failed, Report, Step, command, wait

SOCKET = "/var/run/docker.sock"
PIDFILE = Path("/var/run/docker.pid")
SETTINGS = Path("/etc/docker/daemon.json")
LABEL = f"beaker.executor={host.STATE}"  # the containers of this executor's sessions


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(SOCKET)


def call(method: str, path: str, body: bytes | Iterable[bytes] | None = None) -> tuple[int, Any]:
    """One call: status, and the JSON of the answer (None if there is none). Raises OSError without an engine."""
    connection = _Connection("localhost")
    try:
        connection.request(method, path, body, encode_chunked=True, headers=_headers(body))
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if text.strip() else None
    finally:
        connection.close()


def stream(method: str, path: str, body: bytes | Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """One long call: the JSON objects of its answer as they come. Raises Failed for the engine's error."""
    connection = _Connection("localhost")
    try:
        connection.request(method, path, body, encode_chunked=True, headers=_headers(body))
        response = connection.getresponse()
        if response.status >= 300:
            raise Failed(f"Docker Engine: {response.status}: {response.read().decode(errors='replace').strip()}")
        for line in response:
            event = json.loads(line)
            if "errorDetail" in event:
                raise Failed(f"Docker Engine: {event['errorDetail'].get('message')}")
            yield event
    finally:
        connection.close()


def _headers(body: bytes | Iterable[bytes] | None) -> dict[str, str]:
    chunked = {"Transfer-Encoding": "chunked"} if body is not None and not isinstance(body, bytes) else {}
    return {"Content-Type": "application/x-tar", **chunked} if body is not None else {}


def running() -> bool:
    """Whether an engine listens. Other users than root may not ask it, so for them its process is the evidence."""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(SOCKET)
        return True
    except PermissionError:
        try:
            return host.start_time(int(PIDFILE.read_text())) is not None
        except (OSError, ValueError):
            return host.SYSTEMD  # socket activation starts it when it is needed
    except OSError:
        return False


def _start(report: Report) -> str:
    packages.install(packages.DOCKER, report)
    if host.SYSTEMD:
        command(["systemctl", "enable", "--now", "docker.service"], report)
        wait("Docker Engine (docker.service)", running, lambda: True)
        return "started docker.service"
    program = host.which("dockerd")
    if not program:
        raise Failed("there is no dockerd, though the system packages are installed")
    # So that sessions outlive the engine. A setting that is both in the file and a flag would be refused.
    flags = [] if SETTINGS.exists() and "live-restore" in json.loads(SETTINGS.read_text()) else ["--live-restore"]
    process = daemon.start("dockerd", [program, *flags])
    wait("Docker Engine", running, lambda: daemon.alive(process))
    return f"started, log {daemon.log('dockerd')}"


def stop() -> int | None:
    """Stop the engine if set-up started it, its sessions' containers before it: their number, or None if it did not."""
    if not daemon.pid("dockerd"):
        return None
    sessions = containers() if running() else []
    for container in sessions:
        call("POST", f"/containers/{container}/stop?t=10")
    daemon.stop("dockerd")
    return len(sessions)


def containers(stopped: bool = False) -> list[str]:
    """The ids of sessions' containers."""
    filters = json.dumps({"label": [LABEL]}, separators=(",", ":"))
    _, found = call("GET", f"/containers/json?all={int(stopped)}&filters={filters}")
    return [container["Id"] for container in found]


def networks() -> list[str]:
    """The names of sessions' networks."""
    filters = json.dumps({"label": [LABEL]}, separators=(",", ":"))
    _, found = call("GET", f"/networks?filters={filters}")
    return [network["Name"] for network in found]


step = Step("Docker Engine", lambda: driver.name() == "docker" and not running(), _start)
needed = Step("Docker Engine for the image", lambda: not running(), _start)
