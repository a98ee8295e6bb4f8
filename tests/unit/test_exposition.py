"""What server and executor tell Prometheus, as its own parser reads it."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from beaker_sessions.errors import Error
from beaker_sessions.executor import exposition as node_exposition
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Gpu, Identity, Request
from beaker_sessions.server import exposition
from tests.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as lab:
        yield lab


def test_prometheus_is_told_what_is_known(lab: Lab) -> None:
    node = lab.node("gpu-1", 2)
    id = node.session("root", (0,))
    gpus = {"nvidia.com/gpu=0": {"use": 37}}
    now = datetime.now(UTC).isoformat()
    node.beat(samples=[{"at": now, "gpus": gpus, "sessions": {id: {"disk": 5 << 30}}}])
    other = lab.node("gpu-2", 1)
    other.beat()
    other.silent()
    asked = urllib.request.Request(lab.address + "/metrics")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked)
    refused.value.close()
    assert refused.value.code == 401
    asked.add_header("Authorization", f"Bearer {lab.admin}")
    with urllib.request.urlopen(asked) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        told_of = exposed(answer.read().decode())
    place = {"node": "gpu-1", "cluster": "lab/main"}
    assert told_of["beaker_gpu_utilisation_percent"] == [({**place, "gpu": "nvidia.com/gpu=0"}, 37)]
    assert told_of["beaker_node_gpus_free"] == [(place, 1)], "not known is not zero"
    assert told_of["beaker_node_up"] == [(place, 1), ({**place, "node": "gpu-2"}, 0)]
    assert told_of["beaker_sessions"] == [({"state": "started"}, 1)]
    assert told_of["beaker_session_disk_used_bytes"] == [({"node": "gpu-1", "session": id}, 5 << 30)]
    assert "beaker_session_cpu_used_cores" not in told_of
    evil = 'a"b\\c\nd\udcff'
    assert exposed(exposition.text([], {}, {evil: 1}))["beaker_sessions"] == [({"state": evil[:-1] + "?"}, 1)]


def exposed(text: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Name -> labels and value, as Prometheus' own parser reads them; all are gauges that say what they are."""
    families = list(text_string_to_metric_families(text))
    assert {family.type for family in families} == {"gauge"}
    assert all(family.documentation for family in families)
    return {family.name: [(sample.labels, sample.value) for sample in family.samples] for family in families}


def test_an_executor_tells_prometheus_of_its_node(tmp_path: Path) -> None:
    gpus = (Gpu("lab/gpu=0", 'odd "kind"\\'), Gpu("lab/gpu=1", "plain"))
    ledger = Ledger(tmp_path / "ledger.db")
    sessions = Sessions(ledger, Inventory("gpu-1", 8.0, 1 << 36, gpus))
    user = Identity("ann", 1500, 1500, "/home/ann")
    held = sessions.create("ann", user, Request(gpus=1, cpus=2.5, memory=1 << 30), None).id
    sessions.create("ann", user, Request(gpus=2, cpus=0.0, memory=0), None)
    used = {held: {"cpu": 0.5, "disk": 1 << 20}}
    sample = {"node": {"cpu": 3.5}, "gpus": {"lab/gpu=0": {"use": 40.0}}, "sessions": used}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for wrong in ("9464", "127.0.0.1:", ":9464", "127.0.0.1:99999", "192.0.2.1:9464"):
        with pytest.raises(Error, match="metrics: "):
            node_exposition.serve(wrong, sessions, dict, lambda: None)
    node_exposition.serve(f"127.0.0.1:{port}", sessions, lambda: sample, lambda: 1234.5)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        told_of = exposed(answer.read().decode())
    first, second = {"gpu": "lab/gpu=0", "type": gpus[0].type}, {"gpu": "lab/gpu=1", "type": "plain"}
    assert told_of["beaker_executor_gpu_claimed"] == [(first, 1), (second, 0)]
    assert told_of["beaker_executor_gpu_utilisation_percent"] == [(first, 40)], "what is not known has no line"
    states = {labels["state"]: value for labels, value in told_of["beaker_executor_sessions"]}
    assert states == {"created": 1, "scheduled": 1, "started": 0, "exited": 0}
    values = {name: found[0][1] for name, found in told_of.items() if len(found) == 1}
    assert values["beaker_executor_queue"] == 1
    assert (values["beaker_executor_cpus_claimed"], values["beaker_executor_cpu_used_cores"]) == (2.5, 3.5)
    assert values["beaker_executor_report_time_seconds"] == 1234.5
    assert told_of["beaker_executor_session_disk_used_bytes"] == [({"session": held, "account": "ann"}, 1 << 20)]
    assert "beaker_executor_memory_used_bytes" not in told_of
    ledger.close()
