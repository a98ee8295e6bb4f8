"""What nodes and sessions used: rules and answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from .. import wire
from ..errors import Error
from . import exposition
from .jobs import job_of
from .nodes import node_json, node_of
from .rules import JSON, Caller, Rules
from .samples import FRESH, KEPT, Point
from .store import Rows


class Metrics(Rules):
    def node_metrics(self, caller: Caller, node: str, *, hours: float = 24.0) -> JSON:  # noqa: ARG002
        """What a node used in the last hours: `step` in seconds, and `data`, points with `at`, the oldest first."""
        with self.store.read() as rows:
            end = rows.now.timestamp()
            step, points = _history(rows, node_of(rows, node).id, end - 3600 * _checked(hours), end)
        return {"step": step, "data": [{"at": _time(at), **point} for at, point in points]}

    def job_metrics(self, caller: Caller, id: str) -> JSON:  # noqa: ARG002
        """What a session and its GPUs used, from when it was given them to its end, or to now."""
        with self.store.read() as rows:
            row = job_of(rows, id)
            session = wire.session(json.loads(row.body))
            if session.scheduled is None:
                return {"step": min(KEPT), "data": []}
            end = (session.exited or session.finalized or rows.now).timestamp()
            step, points = _history(rows, row.node_id, session.scheduled.timestamp(), end)
        held = session.claim.gpus if session.claim else ()
        return {"step": step, "data": [{"at": _time(at), **_of_job(point, id, held)} for at, point in points]}

    def exposition(self, caller: Caller) -> str:
        """Everything that is known now, in Prometheus' text, for administrators."""
        caller.need_admin()
        with self.store.read() as rows:
            nodes = [node_json(row, rows.now) for row in rows.nodes()]
            states = rows.states()
        return exposition.text(nodes, self.usage(caller, [node["id"] for node in nodes]), states)

    def usage(self, caller: Caller, nodes: Sequence[str]) -> dict[str, Point]:  # noqa: ARG002
        """Node id -> its last sample, of those that have a fresh one. For the console, which shows many at once."""
        with self.store.read() as rows:
            latest = rows.samples(nodes, min(KEPT), int(rows.now.timestamp()) - FRESH)
            return {row.node_id: json.loads(row.body) for row in latest}  # the newest is the last


def _history(rows: Rows, node: str, start: float, end: float) -> tuple[int, list[tuple[int, Point]]]:
    """In the finest step that reaches back to the start."""
    step = next((step for step, kept in KEPT.items() if start >= rows.now.timestamp() - kept - step), max(KEPT))
    found = rows.samples([node], step, int(start) - int(start) % step, int(end) + 1)
    return step, [(row.at, json.loads(row.body)) for row in found]


def _of_job(point: Point, id: str, gpus: Iterable[str]) -> JSON:
    used = point.get("sessions", {}).get(id, {})
    return dict(used) | {"gpus": {gpu: point["gpus"][gpu] for gpu in gpus if gpu in point.get("gpus", {})}}


def _checked(hours: float) -> float:
    if not 0 < hours <= 24 * 30:
        raise Error("invalid", f"hours: {hours:g} is not between 0 and 720", "samples are kept for 30 days")
    return hours


def _time(at: int) -> str | None:
    return wire.time(datetime.fromtimestamp(at, UTC))
