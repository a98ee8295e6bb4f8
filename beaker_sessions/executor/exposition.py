"""`/metrics` of one node for Prometheus: what is here, who has claimed it, and what is used of it.

Owns the listener, which is there only where the settings name one; anybody who reaches it reads it, so it belongs on
the loopback or behind a firewall. Must not change anything.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from .. import __version__
from ..errors import Error
from ..exposition import Gauge, registry
from ..model import LIVE, State
from .ledger import held
from .sessions import Sessions

Sample = dict[str, Any]  # as `bodies.Sample`
Moment = Callable[[], float | None]  # seconds since the epoch, None before the first time
log = logging.getLogger(__name__)


def serve(address: str, sessions: Sessions, last: Callable[[], Sample], reported: Moment) -> None:
    """Listen at HOST:PORT in a thread. last: the newest sample. reported: when the server heard of this node last.

    Raises Error invalid for what is no address, or one that is taken.
    """
    from prometheus_client import start_http_server

    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Error("invalid", f"metrics: {address!r} is not HOST:PORT", "for example 127.0.0.1:9464")
    try:
        start_http_server(int(port), host, registry(lambda: gauges(sessions, last(), reported())))
    except OSError as error:
        why = error.strerror or os.strerror(error.errno or 0)
        raise Error("invalid", f"metrics: cannot listen at {address}: {why}", "choose another address") from error
    log.info("metrics for Prometheus at http://%s/metrics", address)


def gauges(sessions: Sessions, sample: Sample, reported: float | None) -> list[Gauge]:
    """sample: {} where none is fresh; then nothing is said of use."""
    has, live = sessions.inventory, sessions.live()
    claims = [session.claim for session in live if session.claim and session.state in LIVE]
    count, taken = Counter(session.state for session in live), held(live)
    node, per_gpu, per_session = (sample.get(key, {}) for key in ("node", "gpus", "sessions"))
    gpus = [({"gpu": gpu.id, "type": gpu.type}, per_gpu.get(gpu.id, {})) for gpu in has.gpus]
    running = [({"session": one.id, "account": one.account}, per_session.get(one.id, {})) for one in live]

    def one(value: float | None) -> list[tuple[dict[str, str], float | None]]:
        return [({}, value)]

    return [
        ("beaker_executor_info", "what runs here, always 1", [({"hostname": has.hostname, "version": __version__}, 1)]),
        ("beaker_executor_report_time_seconds", "when the server heard of this node last", one(reported)),
        ("beaker_executor_cordoned", "1 when nothing new is started here", one(float(bool(sessions.cordoned)))),
        ("beaker_executor_sessions", "sessions that have not ended, by state",
         [({"state": state.value}, count[state]) for state in State if state != State.FINALIZED]),
        ("beaker_executor_queue", "sessions that wait", one(count[State.CREATED])),
        ("beaker_executor_cpus", "logical cores", one(has.cpus)),
        ("beaker_executor_cpus_claimed", "logical cores that sessions hold", one(sum(c.cpus for c in claims))),
        ("beaker_executor_cpu_used_cores", "CPU in use", one(node.get("cpu"))),
        ("beaker_executor_memory_bytes", "memory for sessions", one(has.memory)),
        ("beaker_executor_memory_claimed_bytes", "memory that sessions hold", one(sum(c.memory for c in claims))),
        ("beaker_executor_memory_used_bytes", "memory in use", one(node.get("memory"))),
        ("beaker_executor_disk_used_bytes", "disk in use below the executor's state", one(node.get("disk"))),
        ("beaker_executor_gpu_claimed", "1 when a session holds it",
         [(labels, float(labels["gpu"] in taken)) for labels, _ in gpus]),
        ("beaker_executor_gpu_utilisation_percent", "share of the time in which it was busy",
         [(labels, used.get("use")) for labels, used in gpus]),
        ("beaker_executor_gpu_memory_used_bytes", "GPU memory in use",
         [(labels, used.get("memory")) for labels, used in gpus]),
        ("beaker_executor_gpu_memory_bytes", "GPU memory", [(labels, used.get("total")) for labels, used in gpus]),
        ("beaker_executor_session_cpu_used_cores", "CPU that a session uses",
         [(labels, used.get("cpu")) for labels, used in running]),
        ("beaker_executor_session_memory_used_bytes", "memory that it uses",
         [(labels, used.get("memory")) for labels, used in running]),
        ("beaker_executor_session_disk_used_bytes", "disk that it has written, outside of homes and mounts",
         [(labels, used.get("disk")) for labels, used in running]),
    ]  # fmt: skip
