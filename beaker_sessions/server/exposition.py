"""The text in which Prometheus reads metrics. Pure functions of answers; what is not known has no line.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/ (0.0.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TYPE = "text/plain; version=0.0.4; charset=utf-8"
Line = tuple[Mapping[str, str], float | None]


def text(nodes: Iterable[Mapping[str, Any]], usage: Mapping[str, Mapping[str, Any]], states: Mapping[str, int]) -> str:
    """nodes: as in REST. usage: node id -> its last sample, if that is fresh. states: session's state -> how many."""
    every = [
        ({"node": node["hostname"], "cluster": node["cluster"]}, node, usage.get(node["id"], {})) for node in nodes
    ]
    told = [(labels, node, used) for labels, node, used in every if node["status"] != "not reporting"]
    gpus = [(labels | {"gpu": id}, gpu) for labels, _, used in told for id, gpu in sorted(used.get("gpus", {}).items())]
    metrics: list[tuple[str, str, Iterable[Line]]] = [
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
        ("beaker_sessions", "sessions that have not ended, by state",
         [({"state": state}, float(count)) for state, count in sorted(states.items())]),
    ]  # fmt: skip
    return "".join(_metric(*metric) for metric in metrics)


def _metric(name: str, help: str, lines: Iterable[Line]) -> str:
    known = [f"{name}{{{_labels(labels)}}} {value:.15g}\n" for labels, value in lines if value is not None]
    return f"# HELP {name} {help}\n# TYPE {name} gauge\n" + "".join(known) if known else ""


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items())


def _escape(value: str) -> str:
    plain = value.encode("utf-8", "replace").decode()  # lone surrogates have no place in UTF-8
    return plain.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
