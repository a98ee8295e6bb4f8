"""How samples are kept: in thinning resolution, each step for its time. Unknown stays unknown, it is never zero.

Owns the steps, so that the database is bounded: at most 6,120 rows for each node that reports.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..bodies import Sample
from .store import Rows

KEPT = {10: 3600, 60: 86400, 600: 30 * 86400}  # step -> for how long, both in seconds
FRESH = 45  # seconds after which the last sample no longer says what is used now
# {"node": {cpu, memory, disk}, "gpus": {id: {use, memory, total}}, "sessions": {id: {cpu, memory, disk}}}
Point = Mapping[str, Any]


def keep_samples(rows: Rows, node: str, samples: Iterable[Sample]) -> None:
    """Write them, with the means of the longer steps that they fall into, and forget what is too old."""
    now, kept = rows.now.timestamp(), False
    for sample in samples:
        at = int(sample.at.timestamp())
        if not now - KEPT[10] <= at <= now + FRESH:
            continue  # a clock that is wrong must not write history
        point = sample.model_dump(include={"node", "gpus", "sessions"}, exclude_none=True)
        rows.keep_sample(node, 10, at - at % 10, json.dumps(point))
        for step, finer in ((60, 10), (600, 60)):
            start = at - at % step
            parts = [json.loads(row.body) for row in rows.samples([node], finer, start, start + step)]
            rows.keep_sample(node, step, start, json.dumps(mean(parts)))
        kept = True
    if kept:
        rows.touch(node)
        rows.forget_samples({step: int(now) - kept for step, kept in KEPT.items()})


def mean(points: Sequence[Point]) -> Point:
    """Of every number that is there, over the points that have it."""
    found: dict[tuple[str, ...], list[float]] = {}
    for point in points:
        for path, number in _numbers(point):
            found.setdefault(path, []).append(number)
    result: dict[str, Any] = {}
    for path, numbers in found.items():
        place = result
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = round(sum(numbers) / len(numbers), 3)
    return result


def _numbers(point: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], float]]:
    for key, value in point.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, (*path, key))
        else:
            yield (*path, key), value
