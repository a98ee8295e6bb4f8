"""Sessions on the record, over HTTP."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from beaker_sessions import ids, model, wire
from beaker_sessions.errors import Error
from beaker_sessions.model import State
from beaker_sessions.server import jobs

NOW = datetime.now(UTC)


def code(call: object, *args: object, **kwargs: object) -> str:
    with pytest.raises(Error) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    assert caught.value.message
    return caught.value.code


def started(session: model.Session, revision: int = 2) -> model.Session:
    claim = model.Claim(("lab/gpu=0",), 4.0, 1 << 30)
    return replace(session, state=State.STARTED, scheduled=NOW, started=NOW, claim=claim, revision=revision)


def ended(session: model.Session, revision: int = 3, exit_code: int = 0) -> model.Session:
    times = {"scheduled": NOW, "started": NOW, "exited": NOW, "finalized": NOW}
    return replace(session, state=State.FINALIZED, revision=revision, exit_code=exit_code, **times)


def test_life_of_a_session_created_from_afar(server: SimpleNamespace, node: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    asked = {
        "node": "gpu-1", "name": "train", "requests": {"gpuCount": 1, "memory": "6.5GiB"}, "command": ["a", "b\udcff"],
        "envVars": [{"name": "KEY", "value": "s3cret"}], "image": {"docker": "debian:12"}, "timeout": "8h",
    }  # fmt: skip
    job = ann.create_job({"session": asked})
    assert job["kind"] == "session"
    assert job["author"]["name"] == "ann"
    assert (job["node"], job["nodeHostname"], job["cluster"]) == (node.id, "gpu-1", "lab/main")
    assert job["requests"] == {"gpuCount": 1, "memory": "6.5GiB"}
    assert set(job["status"]) == {"created"}
    assert job["session"]["command"] == ["a", "b\udcff"]
    for _ in range(2):  # until the node reports it, in case the answer was lost
        [handed] = node.beat()["jobs"]
        assert handed["id"] == job["id"]
    session = wire.session(handed)
    assert session.request.env == (("KEY", "s3cret"),)
    node.executor.report_job(job["id"], wire.job(replace(session, revision=1), queuePosition=3))
    assert node.beat()["jobs"] == []
    assert ann.get_job(job["id"])["queuePosition"] == 3
    node.executor.report_job(job["id"], wire.job(started(session)))
    running = ann.get_job(job["id"])
    assert running["limits"] == {"gpus": ["lab/gpu=0"], "cpuCount": 4.0, "memory": "1GiB"}
    assert "queuePosition" not in running
    node.executor.put_logs(job["id"], b"\x1b[1mout\xff\n")
    assert ann.get_logs(job["id"]) == b"\x1b[1mout\xff\n"
    final = node.executor.report_job(job["id"], wire.job(ended(session, exit_code=7)))
    assert final["status"]["exitCode"] == 7
    assert final["revision"] == 3


def test_final_states_and_old_revisions_change_nothing(server: SimpleNamespace, node: SimpleNamespace) -> None:
    session = model.Session(ids.ulid(), "ann", node.id, model.Request(), created=NOW, revision=1)
    report = node.executor.report_job
    report(session.id, wire.job(session))
    report(session.id, wire.job(started(session, 5)))
    assert "started" in report(session.id, wire.job(replace(session, revision=4)))["status"]
    assert report(session.id, wire.job(replace(started(session, 5), message="same revision"))).get("message") is None
    final = report(session.id, wire.job(ended(session, 6, exit_code=3)))
    for late in (ended(session, 7, exit_code=0), started(session, 8), replace(session, revision=9)):
        assert report(session.id, wire.job(late)) == final
    assert server.client(server.ann).update_job(session.id, {"status": {"canceled": True}}) == final
    assert server.client(server.ann).get_job(session.id) == final


def test_cancel_before_the_node_heard_of_it(server: SimpleNamespace, node: SimpleNamespace) -> None:
    ann = server.client(server.ann)
    job = ann.create_job({"session": {"node": "gpu-1"}})
    final = ann.update_job(job["id"], {"status": {"canceled": True, "canceledFor": "changed my mind"}})
    assert {"finalized", "canceled"} <= set(final["status"])
    assert final["status"]["canceledFor"] == "changed my mind"
    beat = node.beat()
    assert (beat["jobs"], beat["cancel"]) == ([], [])


def test_cancel_of_what_the_node_has(server: SimpleNamespace, node: SimpleNamespace) -> None:
    ann, bob = server.client(server.ann), server.client(server.bob)
    job = ann.create_job({"session": {"node": "gpu-1"}})
    node.beat()
    assert code(bob.update_job, job["id"], {"status": {"canceled": True}}) == "forbidden"
    asked = ann.update_job(job["id"], {"status": {"canceled": True, "canceledFor": "a typo"}})
    assert "canceled" in asked["status"]
    assert "finalized" not in asked["status"], "only the node knows when it has ended"
    beat = node.beat()
    assert beat["cancel"] == [job["id"]]
    assert code(ann.update_job, job["id"], {"status": {"canceled": False}}) == "invalid"
    last = replace(ended(wire.session(job)), created=NOW, canceled=NOW, canceled_for="stopped by the server")
    final = node.executor.report_job(job["id"], wire.job(last))
    assert node.beat()["cancel"] == []
    assert final["status"]["canceledFor"] == "a typo"
    assert final["status"]["created"] == job["status"]["created"]


@pytest.mark.usefixtures("node")
def test_others_see_that_but_not_what(server: SimpleNamespace) -> None:
    asked = {"node": "gpu-1", "command": ["secret"], "envVars": [{"name": "KEY", "value": "s3cret"}]}
    job = server.client(server.ann).create_job({"session": asked})
    bob = server.client(server.bob)
    for seen in (bob.get_job(job["id"]), bob.list_jobs()["data"][0]):
        assert seen["id"] == job["id"]
        assert seen["author"]["name"] == "ann"
        assert not {"command", "envVars"} & set(seen["session"])
    assert server.client(server.admin).get_job(job["id"]) == job
    assert code(bob.get_logs, job["id"]) == "forbidden"


def test_filters_and_pages(server: SimpleNamespace, node: SimpleNamespace) -> None:
    ann, bob = server.client(server.ann), server.client(server.bob)
    jobs = [(ann if i % 2 else bob).create_job({"session": {"cluster": "lab/main"}})["id"] for i in range(7)]
    ann.update_job(jobs[1], {"status": {"canceled": True}})
    node.beat()
    node.executor.report_job(jobs[3], wire.job(started(wire.session(ann.get_job(jobs[3])))))

    def listed(**filters: object) -> list[int]:
        return [jobs.index(job["id"]) for job in bob.jobs(**filters)]

    assert listed() == [6, 5, 4, 3, 2, 1, 0]
    assert listed(limit=2) == [6, 5, 4, 3, 2, 1, 0]
    assert bob.list_jobs(limit=2)["next"] == jobs[5]
    assert listed(author="ann") == [5, 3, 1]
    assert listed(finalized=True) == [1]
    assert listed(finalized=False, limit=4) == [6, 5, 4, 3, 2, 0]
    assert listed(scheduled=True) == [3, 1]
    assert listed(node="gpu-1", cluster="lab/main", kind="session") == listed()
    assert listed(node=node.id, author="ann", scheduled=False) == [5]
    assert listed(kind="execution") == []
    assert code(bob.list_jobs, author="nobody") == "not_found"
    assert code(bob.list_jobs, cursor="x") == "invalid"
    assert code(bob.list_jobs, finalized="maybe") == "invalid"


@pytest.mark.usefixtures("node")
def test_placement(server: SimpleNamespace) -> None:
    token = server.client(server.admin).create_token({"name": "gpu-2", "scope": "executor"})["token"]
    other, instance = server.client(token), ids.ulid()
    limits = {"cpuCount": 4, "memory": "8GiB", "gpuCount": 3}
    id = other.register_node("lab/main", {"hostname": "gpu-2", "limits": limits, "instance": instance})["id"]
    other.heartbeat(id, {"instance": instance, "free": {"gpuCount": 3}})
    ann = server.client(server.ann)

    def where(**requests: object) -> str:
        return ann.create_job({"session": {"cluster": "lab/main", "requests": requests}})["nodeHostname"]

    assert where(gpuCount=2) == "gpu-2"
    assert where(gpuCount=1) == "gpu-1", "gpu-2 has one left, although it has not said so"
    assert where(cpuCount=8) == "gpu-1"
    assert where(gpuCount=3) == "gpu-2", "it waits where it could ever run"
    for impossible in ({"gpuCount": 4}, {"memory": "65GiB"}, {"cpuCount": 4.5, "gpuCount": 3}):
        assert code(ann.create_job, {"session": {"cluster": "lab/main", "requests": impossible}}) == "invalid"
    assert code(ann.create_job, {"session": {"node": "gpu-1", "requests": {"gpuCount": 3}}}) == "invalid"
    assert code(ann.create_job, {"session": {}}) == "invalid"
    assert code(ann.create_job, {"session": {"node": "none"}}) == "not_found"


@pytest.mark.usefixtures("node")
def test_same_key_same_session(server: SimpleNamespace) -> None:
    ann, body = server.client(server.ann), {"session": {"node": "gpu-1", "name": "one"}}
    first = ann.create_job(body, key="k1")
    assert ann.create_job(body, key="k1") == first
    assert server.client(server.bob).create_job(body, key="k1")["id"] != first["id"]
    assert code(ann.create_job, {"session": {"node": "gpu-1", "name": "two"}}, key="k1") == "conflict"
    assert len(list(ann.jobs(author="ann"))) == 1


def test_reports_only_of_own_sessions(node: SimpleNamespace) -> None:
    session = model.Session(ids.ulid(), "ann", node.id, model.Request(), revision=1)
    report = node.executor.report_job
    assert code(report, ids.ulid(), wire.job(session)) == "invalid"
    assert code(report, session.id, wire.job(replace(session, node=ids.ulid()))) == "forbidden"
    assert code(report, session.id, wire.job(replace(session, account="nobody"))) == "not_found"
    assert code(report, session.id, wire.job(session) | {"instance": "0" * 26}) == "conflict"
    assert code(report, session.id, wire.job(session) | {"instance": ids.ulid()}) == "not_found"
    report(session.id, wire.job(session) | {"instance": node.instance})
    stolen = report(session.id, wire.job(replace(session, account="bob", revision=2)))
    assert stolen["author"]["name"] == "ann"
    assert code(node.executor.put_logs, session.id, bytes((1 << 20) + 1)) == "invalid"


def test_the_oldest_outputs_of_an_account_make_room(
    server: SimpleNamespace, node: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LOGS_LIMIT", 10)

    def finished(account: str) -> str:
        session = model.Session(ids.ulid(), account, node.id, model.Request(), created=NOW, revision=1)
        node.executor.report_job(session.id, wire.job(ended(session, exit_code=0)))
        return session.id

    late, first, second, others = finished("ann"), finished("ann"), finished("ann"), finished("bob")
    for id, output in ((first, b"1111"), (others, b"of bob's"), (second, b"2222"), (late, b"3333")):
        node.executor.put_logs(id, output)
    ann, bob = server.client(server.ann), server.client(server.bob)
    assert [ann.get_logs(id) for id in (first, second, late)] == [b"", b"2222", b"3333"]
    assert bob.get_logs(others) == b"of bob's"
