"""What may go wrong: the server killed, its database full or locked, requests of any bytes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy as sa

from beaker_sessions import ids
from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.server import migrations, tables
from beaker_sessions.server.main import main
from beaker_sessions.server.routes import api
from beaker_sessions.server.seal import Seal
from beaker_sessions.server.service import Service
from beaker_sessions.server.store import Store, sqlite_url
from beaker_sessions.transport import Endpoint

from .test_permissions import call

INIT = (
    "init",
    "--account",
    "ann",
    "--hostname",
    "gpu-1",
    "--token-file",
    "{}/token",
    "--executor-token-file",
    "{}/executor.token",
)


def serve(path: Path, port: int = 0) -> tuple[subprocess.Popen[str], int]:
    """A server process, and the port that its log names."""
    command = [sys.executable, "-m", "beaker_sessions.server.main", "--storage-path", str(path)]
    process = subprocess.Popen(
        [*command, "serve", "--port", str(port)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "BEAKER_SERVER_SOCKETS": str(path / "run")},
    )  # fmt: skip
    assert process.stderr
    for line in process.stderr:
        if found := re.search(r"at 127\.0\.0\.1 port (\d+)", line):
            return process, int(found[1])
    raise AssertionError(f"the server ended with {process.wait()}")


def end(process: subprocess.Popen[str], by: signal.Signals) -> int:
    process.send_signal(by)
    code = process.wait(timeout=20)
    assert process.stderr
    process.stderr.close()
    return code


def initialize(path: Path) -> dict[str, str]:
    assert main(["--storage-path", str(path), *(word.format(path) for word in INIT)]) == 0
    return {name: (path / name).read_text().strip() for name in ("token", "executor.token")}


def test_killed_in_a_burst_of_creates(tmp_path: Path) -> None:
    """kill -9: what was acknowledged is there, and what is repeated with the same key is there once."""
    tokens = initialize(tmp_path)
    process, port = serve(tmp_path)
    plain, instance = f"http://127.0.0.1:{port}", ids.ulid()
    address = Endpoint(plain, insecure=[plain])
    executor = Client(address, tokens["executor.token"])
    node = executor.register_node("lab/main", {"hostname": "gpu-1", "limits": {"gpuCount": 1}, "instance": instance})
    acknowledged: dict[str, str] = {}
    sent: set[str] = set()
    failures: list[str] = []
    enough = threading.Event()

    def create(worker: int) -> None:
        client = Client(address, tokens["token"])
        for number in range(10_000):
            key = f"{worker}-{number}"
            sent.add(key)
            try:
                acknowledged[key] = client.create_job({"session": {"node": "gpu-1", "name": key}}, key=key)["id"]
            except Error as error:
                failures.append(error.code)
                break
            if len(acknowledged) >= 40:
                enough.set()
        client.close()

    workers = [threading.Thread(target=create, args=(worker,)) for worker in range(4)]
    for worker in workers:
        worker.start()
    assert enough.wait(60)
    assert end(process, signal.SIGKILL) == -signal.SIGKILL
    for worker in workers:
        worker.join()
    assert failures == ["unavailable"] * 4
    executor.close()

    process, port = serve(tmp_path, port)
    client = Client(address, tokens["token"])
    try:
        kept = {job["name"]: job["id"] for job in client.jobs()}
        assert kept.items() >= acknowledged.items()
        for key in sent:
            acknowledged[key] = client.create_job({"session": {"node": "gpu-1", "name": key}}, key=key)["id"]
        kept_now = [(job["name"], job["id"]) for job in client.jobs()]
        assert sorted(kept_now) == sorted(acknowledged.items()), "each exactly once"
        executor = Client(address, tokens["executor.token"])
        handed = executor.heartbeat(node["id"], {"instance": instance})["jobs"]
        assert [job["id"] for job in handed] == sorted(acknowledged.values())
        executor.close()
    finally:
        client.close()
        end(process, signal.SIGTERM)


def test_init_is_idempotent(tmp_path: Path) -> None:
    tokens = initialize(tmp_path)
    assert initialize(tmp_path) == tokens
    for file in ("token", "executor.token", "server.db"):
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(tmp_path / "server.db")) as database:
        database.execute("UPDATE tokens SET revoked = created WHERE scope = 'admin'")
        database.commit()
    again = initialize(tmp_path)
    assert again["executor.token"] == tokens["executor.token"]
    assert again["token"] != tokens["token"]


def test_init_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for arguments in (
        ["--storage-path", f"{tmp_path}/file/x", *INIT],
        ["--storage-path", str(tmp_path), "init", "--account", "a b", *INIT[3:]],
        ["--config", f"{tmp_path}/none", *INIT],
    ):
        assert main([word.format(tmp_path) for word in arguments]) in (64, 69)
        said = capsys.readouterr().err
        assert said.startswith("beaker-server: ")
        assert "Traceback" not in said


def test_full_database_is_never_a_success(server: SimpleNamespace, node: SimpleNamespace) -> None:
    def limit(connection: Any, pages: int) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def full(connection: Any) -> None:
        limit(connection, 1)  # SQLite takes the present size where that is more

    ann, engine = server.client(server.ann), server.service.store.engine
    sa.event.listen(engine, "begin", full)
    fill = {"session": {"node": "gpu-1", "command": ["x" * 100_000]}}
    for _ in range(3):
        with pytest.raises(Error, match="SQLITE_FULL") as caught:
            ann.create_job(fill, key="k")
        assert caught.value.code == "unavailable"
    assert ann.whoami()["name"] == "ann"
    sa.event.remove(engine, "begin", full)
    sa.event.listen(engine, "begin", lambda connection: limit(connection, 1 << 30))
    job = ann.create_job(fill, key="k")
    assert [one["id"] for one in node.beat()["jobs"]] == [job["id"]]


def test_locked_database_is_unavailable(server: SimpleNamespace) -> None:
    root, engine = server.client(server.admin), server.service.store.engine
    sa.event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout=50"))
    engine.dispose()
    with contextlib.closing(sqlite3.connect(engine.url.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Error, match="SQLITE_BUSY") as caught:
            root.create_account({"name": "carl"})
        assert caught.value.code == "unavailable"
        assert root.get_account("ann")["name"] == "ann"
    assert root.create_account({"name": "carl"})["name"] == "carl"


def test_unforeseen_failure_has_an_id(server: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    server.service.whoami = lambda _: 1 / 0
    with pytest.raises(Error) as caught:
        server.client(server.ann).whoami()
    assert caught.value.code == "internal"
    id = caught.value.hint.split()[-1]
    assert ids.is_ulid(id)
    [logged] = [record for record in caplog.records if id in record.getMessage()]
    assert logged.exc_info
    assert logged.exc_info[0] is ZeroDivisionError
    assert server.ann not in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("get", "/api/v3/nothing", None, 404),
        ("get", "/api/", None, 404),
        ("put", "/api/v3/user", None, 405),
        ("post", "/api/v3/jobs", b"{", 400),
        ("post", "/api/v3/jobs", {}, 400),
        ("post", "/api/v3/jobs", [], 400),
        ("post", "/api/v3/jobs", {"session": {"node": "gpu-1", "uid": 0}}, 400),
        ("post", "/api/v3/jobs", {"session": {}, "devices": ["/dev/sda"]}, 400),
        ("post", "/api/v3/jobs", b"x" * (2 << 20), 400),
        ("get", "/api/v3/jobs?limit=many", None, 400),
        ("get", "/api/v3/jobs/%00", None, 404),
        ("get", "/api/v3/users/%ff%fe", None, 404),
    ],
)
def test_failures_have_one_shape(server: SimpleNamespace, method: str, path: str, body: Any, status: int) -> None:
    got, answer = call(server.address, method, path, server.ann, body)
    said = json.loads(answer)
    assert (got, said["code"]) == (status, status), said
    assert set(said) == {"code", "error", "message", "hint"}
    assert "\n" not in said["message"]
    assert said["hint"]


def test_without_a_token_nothing_is_told(server: SimpleNamespace) -> None:
    for path in ("/api/v3/nothing", "/api/", "/api/v3/jobs", "/metrics", "/openapi.json"):
        assert call(server.address, "get", path, "", None)[0] == 401
    for path in ("/nothing", "/", "/docs"):  # the console's, which asks people to sign in
        assert call(server.address, "get", path, "", None)[0] == 303
    assert json.loads(call(server.address, "get", "/healthz", "", None)[1])["status"] == "ok"


def test_migrations_make_the_tables(migrated: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    store = Store(sqlite_url(migrated))
    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), tables.METADATA) == []
    store.close()
    scripts = ScriptDirectory(os.path.dirname(migrations.__file__))
    assert scripts.get_heads() == [migrations.HEAD]


def test_every_commit_reaches_the_disk(server: SimpleNamespace) -> None:
    with server.service.store.write() as rows:
        asked = ("journal_mode", "synchronous", "foreign_keys")
        set_to = [rows.connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in asked]
    assert set_to == ["wal", 2, 1]  # 2 is FULL: https://www.sqlite.org/pragma.html#pragma_synchronous


def test_several_servers_start_on_an_empty_database(tmp_path: Path) -> None:
    stores: list[Store] = []
    starts = [threading.Thread(target=lambda: stores.append(Store(sqlite_url(tmp_path / "db")))) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert len(stores) == 4
    for store in stores:
        Service(store, Seal(tmp_path / "server.key")).healthy()
        store.close()


def test_openapi_promises_the_one_shape(server: SimpleNamespace) -> None:
    document = json.loads(call(server.address, "get", "/openapi.json", server.ann, None)[1])
    for path, methods in document["paths"].items():
        for route in methods.values():
            assert "422" not in route["responses"]
            assert path == "/healthz" or set(route["responses"]) >= {"default"}


def test_client_has_the_methods_of_service_and_routes(server: SimpleNamespace) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_") and callable(getattr(kind, name))}

    inside = {"authenticate", "once", "record", "healthy", "initialize", "is_cluster"}
    inside |= {"sign_in", "sign_out", "linked", "redeem", "visitor", "fallen_silent", "usage"}  # for the console
    inside |= {"exposition", "logs_due", "admit"}  # at /metrics, while an answer waits, and for the console
    methods = public(Service) - inside
    assert public(Client) - {"close", "epoch", "forward", "jobs"} == methods
    document = api(server.service).openapi()
    named = {route["operationId"] for path in document["paths"].values() for route in path.values()}
    assert named == methods | {"healthy"}
