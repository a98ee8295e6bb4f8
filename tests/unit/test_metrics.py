"""What executors sample, from real /proc and from cgroups of both versions; how the server keeps it."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from beaker_sessions.bodies import Heartbeat, Sample, check
from beaker_sessions.errors import Error
from beaker_sessions.executor import metrics
from beaker_sessions.ids import ulid
from beaker_sessions.model import Gpu, State
from beaker_sessions.server import samples
from tests.lab import FakeNode, Lab

HYBRID = """\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
99 1 0:2 / / rw,relatime - overlay overlay rw
"""
UNIFIED = "41 31 0:38 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"


def test_a_group_of_version_1_in_a_hybrid() -> None:
    text = "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/docker/abc\n"
    places = metrics.cgroups(text, metrics.mounts(HYBRID))
    assert places["cpuacct"] == Path("/sys/fs/cgroup/cpu,cpuacct/docker/abc")
    assert places["memory"] == Path("/sys/fs/cgroup/memory/docker/abc")
    assert places[""] == Path("/sys/fs/cgroup/unified/docker/abc")


def test_use_of_a_group_of_each_version(tmp_path: Path) -> None:
    old = {"cpuacct": tmp_path / "1", "memory": tmp_path / "1", "": tmp_path / "2"}
    for place in set(old.values()):
        place.mkdir()
    (tmp_path / "1/cpuacct.usage").write_text("2500000000\n")
    (tmp_path / "1/memory.usage_in_bytes").write_text("1000\n")
    (tmp_path / "1/memory.stat").write_text("cache 700\ntotal_inactive_file 300\n")
    (tmp_path / "2/cpu.stat").write_text("usage_usec 1500000\nuser_usec 1\n")
    (tmp_path / "2/memory.current").write_text("5000\n")
    (tmp_path / "2/memory.stat").write_text("anon 1\ninactive_file 1000\n")
    assert (metrics.group_cpu(old), metrics.group_memory(old)) == (2.5, 700)
    new = metrics.cgroups("0::/system.slice/x.scope\n", metrics.mounts(UNIFIED))
    assert new == {"": Path("/sys/fs/cgroup/system.slice/x.scope")}
    assert (metrics.group_cpu({"": tmp_path / "2"}), metrics.group_memory({"": tmp_path / "2"})) == (1.5, 4000)


def sampler(sessions: dict[str, int], tmp_path: Path) -> metrics.Metrics:
    """For a node whose sessions are these processes."""
    live = [SimpleNamespace(id=id, state=State.STARTED) for id in sessions]
    node = SimpleNamespace(live=lambda: live, inventory=SimpleNamespace(gpus=(Gpu("nvidia.com/gpu=0", "x"),)))
    driver = SimpleNamespace(list=lambda: [SimpleNamespace(id=id, pid=pid) for id, pid in sessions.items()])
    return metrics.Metrics(node, driver, str(tmp_path))  # type: ignore[arg-type]


def test_a_sample_of_this_machine_and_process(tmp_path: Path) -> None:
    id, gone = ulid(), ulid()
    sampling = sampler({id: os.getpid(), gone: 0}, tmp_path)
    first = sampling.sample()
    assert "cpu" not in first["node"], "no rate is known before there are two readings"
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    second = sampling.sample()
    assert 0 < second["node"]["cpu"] <= os.cpu_count() + 0.5
    assert 0 < second["node"]["memory"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert second["node"]["disk"] > 0
    assert gone not in second["sessions"], "what has no process has no use that is known"
    if second["sessions"]:  # where this process's own control group can be read
        assert second["sessions"][id]["memory"] > 0
    assert second["gpus"] == {} or second["gpus"]["nvidia.com/gpu=0"]
    assert check(Heartbeat, {"instance": ulid(), "samples": [first, second]}).samples[1].node.cpu


def test_samples_wait_for_the_server_and_are_bounded(tmp_path: Path) -> None:
    sampling = sampler({}, tmp_path)
    for number in range(metrics.KEPT + 5):
        sampling._samples.append({"at": number})
    oldest = sampling.pending(2)
    assert oldest == [{"at": 5}, {"at": 6}]
    sampling.sent([{"at": 1}, *oldest])
    assert sampling.pending(1) == [{"at": 7}]
    assert len(sampling.pending(10000)) == metrics.KEPT - 2


def test_the_mean_is_over_what_is_known() -> None:
    points = [
        {"node": {"cpu": 1.0}, "gpus": {"a": {"use": 100.0}}, "sessions": {}},
        {"node": {"cpu": 3.0, "memory": 10}, "gpus": {"a": {}}},
        {"node": {}, "gpus": {"a": {"use": 0.0}, "b": {"use": 0.0}}},
    ]
    assert samples.mean(points) == {
        "node": {"cpu": 2.0, "memory": 10.0},
        "gpus": {"a": {"use": 50.0}, "b": {"use": 0.0}},
    }
    assert samples.mean([]) == {}


@pytest.fixture
def node(tmp_path: Path) -> FakeNode:
    with Lab(tmp_path) as lab:
        yield lab.node("gpu-1", 2)


def told(ago: float, use: float | None = 50.0, **more: object) -> dict[str, object]:
    at = (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()
    gpus = {} if use is None else {"nvidia.com/gpu=0": {"use": use, "memory": 1 << 30, "total": 1 << 31}}
    return {"at": at, "node": {"cpu": 4.5}, "gpus": gpus, **more}


def test_samples_come_back(node: FakeNode) -> None:
    id = node.session("root", (0,), age=100)
    other = node.session("root", (1,), age=100)
    node.beat(samples=[told(80, use=None), told(30, sessions={id: {"cpu": 2, "memory": 5}, other: {"cpu": 1}})])
    history = node.client.node_metrics("gpu-1", hours=0.5)
    assert history["step"] == 10
    assert history["data"][0]["gpus"] == {}, "a GPU that says nothing is not at 0"
    assert history["data"][-1]["gpus"]["nvidia.com/gpu=0"]["use"] == 50
    job = node.client.job_metrics(id)
    assert job["data"][-1]["cpu"] == 2
    assert job["data"][-1]["gpus"]["nvidia.com/gpu=0"]["use"] == 50
    assert node.client.job_metrics(other)["data"][-1]["gpus"] == {}
    with pytest.raises(Error):
        node.client.node_metrics("gpu-1", hours=-1)


def test_old_samples_are_means_and_the_table_is_bounded(node: FakeNode) -> None:
    """32 days, of which the last two have a sample a minute, the last two hours one every 10 s; and one of tomorrow."""
    store = node.lab.service.store
    moments = [*range(32 * 86400, 2 * 86400, -600), *range(2 * 86400, 7200, -60), *range(7200, -1, -10)]
    busy = {"use": 50.0, "memory": 1 << 36, "total": 1 << 37}
    used = {"node": {"cpu": 40.0, "memory": 1 << 38}, "sessions": {ulid(): {"cpu": 4.0, "memory": 1 << 34}}}
    with store.write() as rows:
        real = rows.now
        for ago in moments:
            rows.now = real - timedelta(seconds=ago)
            gpus = {"g": {"use": 100.0 * (ago // 60 % 2)}} | {f"nvidia.com/gpu={number}": busy for number in range(7)}
            sample = {"at": rows.now.isoformat(), "gpus": gpus, **used}
            samples.keep_samples(rows, node.id, [check(Sample, sample)])
        samples.keep_samples(rows, node.id, [check(Sample, {"at": (real + timedelta(days=1)).isoformat()})])
    with store.read() as rows:
        count = {step: len(rows.samples([node.id], step, 0)) for step in samples.KEPT}
        body = json.loads(rows.samples([node.id], 600, int(real.timestamp()) - 7200)[0].body)
    assert 360 <= count[10] <= 361
    assert 1440 <= count[60] <= 1441
    assert 4320 <= count[600] <= 4321
    assert Path(store.engine.url.database or "").stat().st_size < 12 << 20
    assert body["gpus"]["g"]["use"] == 50
    assert node.client.node_metrics("gpu-1", hours=24)["step"] == 60
    assert node.client.node_metrics("gpu-1", hours=48)["step"] == 600
    assert 4318 <= len(node.client.node_metrics("gpu-1", hours=720)["data"]) <= 4321


def test_usage_is_the_last_sample_while_it_is_fresh(node: FakeNode) -> None:
    node.beat(samples=[told(400)])
    caller = node.lab.service.authenticate(node.lab.admin)
    assert node.lab.service.usage(caller, [node.id]) == {}
    node.beat(samples=[told(12, use=10), told(2, use=99)])
    assert node.lab.service.usage(caller, [node.id])[node.id]["gpus"]["nvidia.com/gpu=0"]["use"] == 99
