"""What a session asks of the server through its socket: the REST API, and nothing else of that server."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.executor.inside import Inside
from beaker_sessions.executor.listener import bind
from beaker_sessions.executor.loop import Loop
from beaker_sessions.transport import Endpoint

ID = "01J00000000000000000000000"


@pytest.fixture
def inside(tmp_path: Path) -> Iterator[Inside]:
    loop = Loop()  # which does not run
    inside = Inside(
        loop, tmp_path / "run", Endpoint("http://127.0.0.1:1", insecure=["http://127.0.0.1:1"]), lambda _: None
    )
    inside.keep_token(ID, "its own")
    yield inside
    loop.passing.stop()
    loop.asyncio.close()


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/healthz",
        "/",
        "//other/x",
        "../../metrics",
        "jobs/../../../metrics",
        "jobs/%2e%2E/x",
        "./jobs",
        "..?x",
    ],
)
def test_a_session_reaches_nothing_beside_the_api(inside: Inside, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    monkeypatch.setattr(Client, "_call", lambda _self, _method, path, *_: sent.append(path) or b"")
    with pytest.raises(Error) as caught:
        inside._frames(ID, {"v": 1, "op": "rest", "method": "GET", "path": path})
    assert (caught.value.code, sent) == ("invalid", [])
    for good in ("user", "jobs?limit=5&cursor=/..", "clusters/lab/main", "workspaces/a/secrets/..x"):
        inside._frames(ID, {"v": 1, "op": "rest", "method": "GET", "path": good})
    assert len(sent) == 4


def test_a_session_that_ends_while_its_socket_is_made_leaves_none(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError) as caught:
        bind(str(tmp_path / "gone"), "socket", socket.SOCK_STREAM)
    kept = caught.value  # with the frame in which the socket was made
    assert set(os.listdir("/proc/self/fd")) == before, kept
