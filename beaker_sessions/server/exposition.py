"""What the server tells Prometheus: pure functions of answers. What is not known has no line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..exposition import TYPE, Gauge
from ..exposition import text as written

__all__ = ["TYPE", "text"]


def text(nodes: Iterable[Mapping[str, Any]], usage: Mapping[str, Mapping[str, Any]], states: Mapping[str, int]) -> str:
    """nodes: as in REST. usage: node id -> its last sample, if that is fresh. states: session's state -> how many."""
    every = [
        ({"node": node["hostname"], "cluster": node["cluster"]}, node, usage.get(node["id"], {})) for node in nodes
    ]
    told = [(labels, node, used) for labels, node, used in every if node["status"] != "not reporting"]
    gpus = [(labels | {"gpu": id}, gpu) for labels, _, used in told for id, gpu in sorted(used.get("gpus", {}).items())]
    sessions = [
        ({"node": labels["node"], "session": id}, one)
        for labels, _, used in told
        for id, one in sorted(used.get("sessions", {}).items())
    ]
    gauges: list[Gauge] = [
        ("beaker_node_up", "1 when the node reports, 0 when it does not",
         [(labels, float(node["status"] != "not reporting")) for labels, node, _ in every]),
        ("beaker_node_cordoned", "1 when the node takes no new session",
         [(labels, float(node["cordoned"])) for labels, node, _ in every]),
        ("beaker_node_gpus", "GPUs that the node has",
         [(labels, float(node["limits"].get("gpuCount") or 0)) for labels, node, _ in every]),
        ("beaker_node_gpus_free", "GPUs that nobody has claimed",
         [(labels, node["free"].get("gpuCount")) for labels, node, _ in told]),
        ("beaker_node_queue", "sessions that wait", [(labels, node["queue"]) for labels, node, _ in told]),
        ("beaker_node_cpu_used_cores", "CPU in use",
         [(labels, used.get("node", {}).get("cpu")) for labels, _, used in told]),
        ("beaker_node_memory_used_bytes", "memory in use",
         [(labels, used.get("node", {}).get("memory")) for labels, _, used in told]),
        ("beaker_node_disk_used_bytes", "disk in use below the executor's state",
         [(labels, used.get("node", {}).get("disk")) for labels, _, used in told]),
        ("beaker_gpu_utilisation_percent", "share of the time in which the GPU was busy",
         [(labels, gpu.get("use")) for labels, gpu in gpus]),
        ("beaker_gpu_memory_used_bytes", "GPU memory in use", [(labels, gpu.get("memory")) for labels, gpu in gpus]),
        ("beaker_session_cpu_used_cores", "CPU that a session uses", [(of, one.get("cpu")) for of, one in sessions]),
        ("beaker_session_memory_used_bytes", "memory that it uses", [(of, one.get("memory")) for of, one in sessions]),
        ("beaker_session_disk_used_bytes", "disk that it has written, outside of homes and mounts",
         [(of, one.get("disk")) for of, one in sessions]),
        ("beaker_sessions", "sessions that have not ended, by state",
         [({"state": state}, float(count)) for state, count in sorted(states.items())]),
    ]  # fmt: skip
    return written(gauges)
