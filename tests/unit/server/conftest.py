"""A real server on a free port of the loopback, with a real SQLite file, and accounts of every kind."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn

from beaker_sessions import ids
from beaker_sessions.client import Client
from beaker_sessions.model import Scope
from beaker_sessions.server.routes import api
from beaker_sessions.server.seal import Seal
from beaker_sessions.server.service import Service
from beaker_sessions.server.store import Store, sqlite_url
from beaker_sessions.transport import Endpoint

LIMITS = {"cpuCount": 8, "memory": "64GiB", "gpuCount": 2, "gpuType": "H200", "gpuIds": ["lab/gpu=0", "lab/gpu=1"]}


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of the newest version, to copy."""
    path = tmp_path_factory.mktemp("migrated") / "server.db"
    Store(sqlite_url(path)).close()
    return path


@pytest.fixture
def server(tmp_path: Path, migrated: Path) -> Iterator[SimpleNamespace]:
    """address, service, and `client(token)`; tokens: admin, executor, and ann's and bob's."""
    service = Service(Store(sqlite_url(Path(shutil.copy(migrated, tmp_path)))), Seal(tmp_path / "server.key"))
    admin, executor = ids.mint_token(), ids.mint_token()
    service.initialize("root", {Scope.ADMIN: admin, Scope.EXECUTOR: executor})
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        web = uvicorn.Server(uvicorn.Config(api(service), log_config=None, access_log=False))
        thread = threading.Thread(target=web.run, args=([listening],))
        thread.start()
        clients: list[Client] = []

        def client(token: str = "") -> Client:
            clients.append(Client(Endpoint(address, insecure=[address]), token))
            return clients[-1]

        while not web.started:
            time.sleep(0.005)
        users = {name: client(admin).create_account({"name": name})["token"] for name in ("ann", "bob")}
        try:
            yield SimpleNamespace(
                address=address, service=service, client=client, admin=admin, executor=executor, **users
            )
        finally:
            for one in clients:
                one.close()
            web.should_exit = True
            thread.join()
            service.store.close()


@pytest.fixture
def node(server: SimpleNamespace) -> SimpleNamespace:
    """A registered node with two GPUs: its json, its executor's client, and `beat()`."""
    executor, instance = server.client(server.executor), ids.ulid()
    json = executor.register_node("lab/main", {"hostname": "gpu-1", "limits": LIMITS, "instance": instance})

    def beat(free: int = 2, **more: object) -> dict:
        body = {"instance": instance, "version": "1", "free": {"gpuCount": free}, **more}
        return executor.heartbeat(json["id"], body)

    beat()
    return SimpleNamespace(id=json["id"], executor=executor, instance=instance, beat=beat, json=json)


@pytest.fixture
def audited(server: SimpleNamespace) -> Callable[[], int]:
    """How many audit rows there are."""
    from beaker_sessions.server import tables

    def count() -> int:
        with server.service.store.read() as rows:
            return len(rows.all(tables.audit))

    return count
