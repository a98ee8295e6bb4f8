"""Clusters and nodes, over HTTP."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from beaker_sessions import ids
from beaker_sessions.bodies import NodeBody, check
from beaker_sessions.client import Client
from beaker_sessions.errors import Error
from beaker_sessions.model import Scope
from beaker_sessions.server import tables
from beaker_sessions.server.seal import Seal
from beaker_sessions.server.service import Service
from beaker_sessions.server.store import Store, sqlite_url


def code(call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(Error) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    assert caught.value.message
    return caught.value.code


def silence(server: SimpleNamespace, node: str, seconds: int) -> None:
    """As if the node had last been heard from that long ago."""
    with server.service.store.write() as rows:
        moment = datetime.now(UTC) - timedelta(seconds=seconds)
        rows.update(tables.nodes, node, seen=moment, expiry=moment + timedelta(seconds=30))


def test_node_in_the_directory(server: SimpleNamespace, node: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    [one] = ann.list_nodes("lab/main")["data"]
    assert one == ann.get_node("gpu-1") == ann.get_node(node.id)
    assert one["limits"] == {
        "cpuCount": 8.0, "memory": "64GiB", "gpuCount": 2, "gpuType": "H200", "gpuIds": ["lab/gpu=0", "lab/gpu=1"]
    }  # fmt: skip
    assert one["status"] == "ok"
    assert one["free"] == {"gpuCount": 2}
    assert one["clusterId"] == ann.get_cluster("lab/main")["id"]


def test_silent_node_is_not_reporting_and_keeps_its_sessions(server: SimpleNamespace, node: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    job = ann.create_job({"session": {"node": "gpu-1"}})
    silence(server, node.id, 29)
    assert ann.get_node("gpu-1")["status"] == "ok"
    silence(server, node.id, 31)
    assert ann.get_node("gpu-1")["status"] == "not reporting"
    assert ann.get_job(job["id"]) == job
    assert code(ann.create_job, {"session": {"node": "gpu-1"}}) == "unavailable"
    node.beat()
    assert ann.get_node("gpu-1")["status"] == "ok"


def test_same_hostname_is_the_same_node_and_fences_the_older_executor(node: SimpleNamespace) -> None:
    new = ids.ulid()
    again = node.executor.register_node("lab/main", {"hostname": "gpu-1", "limits": {}, "instance": new})
    assert again["id"] == node.id
    assert code(node.beat) == "conflict"
    assert node.executor.heartbeat(node.id, {"instance": new})["jobs"] == []
    # One that started later must have registered with a newer database, before this one was restored.
    assert code(node.executor.heartbeat, node.id, {"instance": ids.ulid()}) == "not_found"


def test_a_token_speaks_for_one_node(server: SimpleNamespace, node: SimpleNamespace) -> None:
    body = {"hostname": "gpu-2", "limits": {}}
    assert code(node.executor.register_node, "lab/main", body) == "conflict"
    assert [one["hostname"] for one in server.client(server.ann).list_nodes("lab/main")["data"]] == ["gpu-1"]


@pytest.mark.usefixtures("node")
def test_neighbours_with_what_they_have_free(server: SimpleNamespace) -> None:
    token = server.client(server.admin).create_token({"name": "gpu-2", "scope": "executor"})["token"]
    other, instance = server.client(token), ids.ulid()
    id = other.register_node("lab/main", {"hostname": "gpu-2", "limits": {}, "instance": instance})["id"]
    heard = other.heartbeat(id, {"instance": instance, "free": {"gpuCount": 1}})
    assert heard["nodes"] == [{"hostname": "gpu-1", "free": {"gpuCount": 2}}]
    server.client(server.admin).update_node("gpu-1", {"cordoned": True})
    assert other.heartbeat(id, {"instance": instance})["nodes"] == []


def test_cordoned_node_takes_nothing_new(server: SimpleNamespace, node: SimpleNamespace) -> None:
    root, ann = server.client(server.admin), server.client(server.ann)
    job = ann.create_job({"session": {"node": "gpu-1"}})
    cordoned = root.update_node("gpu-1", {"cordoned": True, "cordonReason": "fan broken"})
    assert (cordoned["status"], cordoned["cordonReason"]) == ("cordoned", "fan broken")
    assert code(ann.create_job, {"session": {"node": "gpu-1"}}) == "unavailable"
    beat = node.beat()
    assert (beat["cordoned"], beat["cordonReason"], beat["jobs"]) == (True, "fan broken", [])
    root.update_node("gpu-1", {"cordoned": False})
    assert [one["id"] for one in node.beat()["jobs"]] == [job["id"]]


def test_a_node_that_drains_itself_takes_nothing_new(server: SimpleNamespace, node: SimpleNamespace) -> None:
    root, ann = server.client(server.admin), server.client(server.ann)
    job = ann.create_job({"session": {"node": "gpu-1"}})
    beat = node.beat(drained="session X does not end")
    assert (beat["cordoned"], beat["jobs"]) == (False, []), "what it said is not told it as somebody else's word"
    assert code(ann.create_job, {"session": {"node": "gpu-1"}}) == "unavailable"
    shown = root.update_node("gpu-1", {"cordoned": False})
    assert (shown["status"], shown["cordonReason"]) == ("cordoned", "session X does not end")
    shown = root.update_node("gpu-1", {"cordoned": True, "cordonReason": "fan"})
    assert shown["cordonReason"] == "fan; session X does not end"
    node.beat()
    assert root.get_node("gpu-1")["cordonReason"] == "fan"
    root.update_node("gpu-1", {"cordoned": False})
    assert [one["id"] for one in node.beat()["jobs"]] == [job["id"]]


def test_deleted_node_ends_its_token(server: SimpleNamespace, node: SimpleNamespace) -> None:
    root, ann = server.client(server.admin), server.client(server.ann)
    job = ann.create_job({"session": {"node": "gpu-1"}})
    assert code(root.delete_node, "gpu-1") == "conflict"
    ann.update_job(job["id"], {"status": {"canceled": True}})
    assert code(root.delete_cluster, "lab/main") == "conflict"
    root.delete_node("gpu-1")
    assert code(node.beat) == "unauthorized"
    assert code(root.get_node, "gpu-1") == "not_found"
    assert ann.get_job(job["id"])["nodeHostname"] == "gpu-1"
    root.delete_cluster("lab/main")
    assert root.list_clusters("lab")["data"] == []
    assert root.create_cluster("lab", {"name": "main"})["fullName"] == "lab/main"


def test_clusters_by_every_name(server: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    one = ann.get_cluster("lab/main")
    assert ann.get_cluster(one["id"]) == one
    assert ann._json("GET", "clusters/lab%2Fmain") == one
    assert ann._json("GET", "clusters/lab%2Fmain/nodes") == {"data": []}
    assert ann.list_clusters("lab")["data"] == [one]
    assert ann.list_clusters(ann.get_organization("lab")["id"])["data"] == [one]
    assert (one["status"], one["autoscale"], one["capacity"], one["preemptible"]) == ("active", False, 0, False)
    for name in ("nodes", "a/b", ids.ulid()):
        assert code(server.client(server.admin).create_cluster, "lab", {"name": name}) == "invalid"
    assert code(ann.get_cluster, "lab/none") == "not_found"
    assert code(ann.list_clusters, "none") == "not_found"


def test_created_cluster_is_made_once(server: SimpleNamespace) -> None:
    root = server.client(server.admin)
    body = {"name": "gpu", "capacity": 2, "preemptible": True, "spec": {"gpuCount": 8, "memory": "1TiB"}}
    one = root.create_cluster("lab", body, key="once")
    assert root.create_cluster("lab", body, key="once") == one
    assert one["nodeSpec"] == {"gpuCount": 8, "memory": "1TiB"}
    assert code(root.create_cluster, "lab", body) == "conflict"


def executor(server: SimpleNamespace, **more: str) -> Client:
    body = {"name": "an executor", "scope": "executor", **more}
    client: Client = server.client(server.client(server.admin).create_token(body)["token"])
    return client


def test_a_rogue_executor_takes_over_no_node(server: SimpleNamespace, node: SimpleNamespace) -> None:
    """Its token is good, and has registered nothing yet."""
    job = server.client(server.ann).create_job({"session": {"node": "gpu-1"}})
    rogue, instance = executor(server), ids.ulid()
    body = {"hostname": "gpu-1", "limits": {}, "instance": instance}
    assert code(rogue.register_node, "lab/main", body) == "conflict"
    for attempt in (lambda: rogue.heartbeat(node.id, {"instance": instance}), lambda: rogue.get_logs(job["id"])):
        assert code(attempt) == "forbidden"
    assert code(rogue.report_job, job["id"], node.beat()["jobs"][0]) == "forbidden"
    assert code(rogue.put_logs, job["id"], b"owned") == "forbidden"
    mine = rogue.register_node("lab/main", body | {"hostname": "rogue"})["id"]
    assert rogue.heartbeat(mine, {"instance": instance})["jobs"] == []
    assert code(rogue.report_job, job["id"], node.beat()["jobs"][0] | {"node": mine}) == "forbidden"
    assert code(rogue.heartbeat, node.id, {"instance": node.instance}) == "forbidden"
    assert code(rogue.register_node, "lab/main", body) == "conflict"
    assert code(rogue.update_node, mine, {"hostname": "gpu-7"}) == "forbidden"
    assert [one["id"] for one in node.beat()["jobs"]] == [job["id"]], "the true node goes on"


def test_a_token_is_for_the_machine_that_it_was_made_for(server: SimpleNamespace) -> None:
    one = executor(server, hostname="gpu-5")
    assert code(one.register_node, "lab/main", {"hostname": "gpu-6", "limits": {}}) == "conflict"
    assert one.register_node("lab/main", {"hostname": "gpu-5", "limits": {}})["hostname"] == "gpu-5"
    root = server.client(server.admin)
    [shown] = [token for token in root.list_tokens()["data"] if token.get("hostname") == "gpu-5"]
    assert shown["scope"] == "executor"
    assert code(root.create_token, {"scope": "user", "hostname": "gpu-5"}) == "invalid"
    assert code(server.client(server.ann).create_token, {"scope": "executor", "hostname": "gpu-5"}) == "forbidden"


def test_an_administrator_makes_a_token_for_an_executor(server: SimpleNamespace) -> None:
    env = {"BEAKER_TOKEN": server.admin, "BEAKER_ADDR": server.address, "BEAKER_INSECURE_ADDRESSES": server.address}
    command = [sys.executable, "-m", "beaker_sessions.cli", "account", "generate-token", "--executor", "gpu-8"]
    done = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
    made = server.client(done.stdout.strip())
    assert code(made.register_node, "lab/main", {"hostname": "gpu-9", "limits": {}}) == "conflict"
    assert made.register_node("lab/main", {"hostname": "gpu-8", "limits": {}})["hostname"] == "gpu-8"
    assert server.client(server.admin).whoami()["name"] == "root", "the administrator's own token is as it was"


def test_an_administrator_lets_another_token_take_over(server: SimpleNamespace, node: SimpleNamespace) -> None:
    """By a token made for that host name, or by deleting the node."""
    instance = ids.ulid()
    body = {"hostname": "gpu-1", "limits": {}, "instance": instance}
    successor = executor(server, hostname="gpu-1")
    assert successor.register_node("lab/main", body)["id"] == node.id
    assert code(node.beat) == "conflict"
    root = server.client(server.admin)
    root.delete_node("gpu-1")
    assert code(successor.heartbeat, node.id, {"instance": instance}) == "unauthorized"
    assert executor(server).register_node("lab/main", body)["id"] != node.id


def test_a_new_token_registers_one_node_however_often_at_once(server: SimpleNamespace) -> None:
    rogue = executor(server)
    caller = server.service.authenticate(rogue.token)  # both requests have come this far
    body = {"limits": {}, "instance": ids.ulid()}
    server.service.register_node(caller, "lab/main", check(NodeBody, body | {"hostname": "gpu-5"}))
    with pytest.raises(Error):
        server.service.register_node(caller, "lab/main", check(NodeBody, body | {"hostname": "gpu-6"}))


def test_a_renamed_node_keeps_its_tokens(server: SimpleNamespace, node: SimpleNamespace) -> None:
    server.client(server.admin).update_node("gpu-1", {"hostname": "gpu-one"})
    body = {"hostname": "gpu-one", "limits": {}, "instance": node.instance}
    assert node.executor.register_node("lab/main", body)["id"] == node.id


def test_existing_tokens_are_of_the_nodes_that_they_registered(tmp_path: Path) -> None:
    store = Store(sqlite_url(tmp_path / "server.db"))
    service, token = Service(store, Seal(tmp_path / "key")), ids.mint_token()
    service.initialize("root", {Scope.EXECUTOR: token, Scope.ADMIN: ids.mint_token()})
    service.register_node(
        service.authenticate(token), "lab/main", check(NodeBody, {"hostname": "gpu-1", "limits": {}})
    )  # fmt: skip
    with store.engine.begin() as connection:  # as version 0007 left it
        connection.exec_driver_sql("ALTER TABLE tokens DROP COLUMN hostname")
        connection.exec_driver_sql("DROP TABLE facts")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0007'")
    store.close()
    store = Store(sqlite_url(tmp_path / "server.db"))
    with store.read() as rows:
        assert {row.scope: row.hostname for row in rows.all(tables.tokens)} == {"executor": "gpu-1", "admin": None}
    store.close()


def test_a_heartbeat_says_which_tokens_have_ended(server: SimpleNamespace, node: SimpleNamespace) -> None:
    ann, root = server.client(server.ann), server.client(server.admin)
    brief = ann.create_token({"name": "brief", "expiry": "1s"})["token"]
    second = ann.create_token({"name": "second"})
    known = [ids.hash_token(token) for token in (server.ann, second["token"], brief)]
    until = time.monotonic() + 10
    while code_or_none(server.client(brief).whoami) is None and time.monotonic() < until:
        time.sleep(0.1)
    strange = "0" * 64
    assert node.beat(vouched=[*known, strange])["refused"] == [known[2]]  # a strange one may be of a lost database
    root.revoke_token(second["id"])
    assert node.beat(vouched=known)["refused"] == sorted(known[1:])
    assert node.beat()["refused"] == []  # nothing is told of tokens that the node does not know
    assert code(node.beat, vouched=["no hash"]) == "invalid"


def code_or_none(call: Callable[[], object]) -> str | None:
    try:
        call()
    except Error as error:
        return error.code
    return None
