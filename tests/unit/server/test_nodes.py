"""Clusters and nodes, over HTTP."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from beaker_sessions import ids
from beaker_sessions.errors import Error
from beaker_sessions.server import tables


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
