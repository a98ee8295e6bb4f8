"""Plots of what was used: from points of the service to the coordinates of an SVG. Pure functions, no markup.

Owns scales and words. Where nothing was reported there is a gap with a look of its own, and never a line at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ...grammar import format_size, parse_size
from .pages import span

JSON = Mapping[str, Any]
WIDTH, HEIGHT = 600, 60
COLUMNS = 200  # at most, of different values
BRIEF = 60  # seconds without a report that say nothing yet


@dataclass(frozen=True)
class Plot:
    """One plot, WIDTH by HEIGHT. area, line, second: SVG path data. gaps: (x, width) where nothing was reported.

    words: what it shows, for those who do not see it. now: what is used, "" when that is not known, None at the end.
    """

    title: str
    top: str
    area: str
    line: str
    second: str
    gaps: tuple[tuple[float, float], ...]
    words: str
    now: str | None


Value = Callable[[JSON], float | None]


def plot(
    title: str, answer: JSON, start: float, end: float, value: Value, top: float, show: Callable[[float], str],
    second: Value | None = None, last: JSON | None = None,
) -> Plot:  # fmt: skip
    """answer: `step` and `data` of the service. start, end: seconds since the epoch. top: the value at the upper edge,
    0 where there is no most.

    second: another value, already a share of 1. last: the point of just now, {} where none is fresh, None at the end.
    """
    count = max(1, min(COLUMNS, int((end - start) / answer["step"])))
    columns = _columns(answer["data"], start, end, count, value)
    known = [one for one in columns if one is not None]
    top = max([top, *known]) if top else 2.0 ** math.ceil(math.log2(max([1.0, *known]) + 1))
    current = None if last is None else value(last)
    gaps = tuple(_gaps(columns, end - start, answer["step"]))
    silent = sum(width for _, width in gaps) * (end - start) / WIDTH
    said = f"mean {show(sum(known) / len(known))}, highest {show(max(known))}" if known else "nothing reported"
    area = " ".join(f"{run} L{_x(at + 1, count)},{HEIGHT} L{_x(first, count)},{HEIGHT} Z" for run, first, at in
                    _runs(columns, top, count))  # fmt: skip
    line = " ".join(run for run, _, _ in _runs(columns, top, count))
    other = _columns(answer["data"], start, end, count, second) if second else []
    return Plot(
        title=title,
        top=show(top),
        area=area,
        line=line,
        second=" ".join(run for run, _, _ in _runs(other, 1.0, count)),
        gaps=gaps,
        words=said + (f", unreported for {span(silent)}" if known and silent >= BRIEF else ""),
        now=None if last is None else "" if current is None else show(current),
    )


def of_node(json: JSON, answer: JSON, start: float, end: float, last: JSON) -> list[Plot]:
    """A node's GPUs, then its CPUs, memory and disk; nothing when there is no point at all."""
    if not answer["data"]:
        return []
    ids = list(json["limits"].get("gpuIds") or ())
    return [
        *_gpus(ids, answer, start, end, last),
        plot("CPUs", answer, start, end, _used("cpu"), json["limits"].get("cpuCount") or 1.0, _cores, last=last),
        plot("Memory", answer, start, end, _used("memory"), _size(json["limits"].get("memory")), _bytes, last=last),
        plot("Disk", answer, start, end, _used("disk"), 0.0, _bytes, last=last),
    ]


def of_job(json: JSON, answer: JSON, start: float, end: float, node: JSON | None) -> list[Plot]:
    """A session's GPUs, CPUs and memory, and its disk where that can be told; nothing when there is no point at all.

    node: its node's point of just now, None after the session's end.
    """
    if not answer["data"]:
        return []
    claim = json.get("limits") or {}
    own = {} if node is None else node.get("sessions", {}).get(json["id"]) or {}
    last = None if node is None else {**own, "gpus": node.get("gpus", {})}
    disk = any("disk" in point for point in answer["data"])
    return [
        *_gpus(claim.get("gpus") or (), answer, start, end, last),
        plot("CPUs", answer, start, end, _of("cpu"), claim.get("cpuCount") or 1.0, _cores, last=last),
        plot("Memory", answer, start, end, _of("memory"), _size(claim.get("memory")), _bytes, last=last),
        *([plot("Disk", answer, start, end, _of("disk"), 0.0, _bytes, last=last)] if disk else []),
    ]


def _gpus(ids: Iterable[str], answer: JSON, start: float, end: float, last: JSON | None) -> list[Plot]:
    def use(id: str) -> Value:
        return lambda point: (point.get("gpus", {}).get(id) or {}).get("use")

    def memory(id: str) -> Value:
        def share(point: JSON) -> float | None:
            gpu = point.get("gpus", {}).get(id) or {}
            return gpu["memory"] / gpu["total"] if gpu.get("total") and "memory" in gpu else None

        return share

    name = "GPU {}".format
    return [
        plot(name(id.rpartition("=")[2]), answer, start, end, use(id), 100.0, _percent, memory(id), last) for id in ids
    ]


def _columns(data: Sequence[JSON], start: float, end: float, count: int, value: Value) -> list[float | None]:
    """The mean of what is known in each column, None where nothing is."""
    sums, numbers = [0.0] * count, [0] * count
    for point in data:
        known = value(point)
        at = (datetime.fromisoformat(point["at"]).timestamp() - start) / (end - start)
        if known is not None and -1 / count < at < 1:
            column = max(0, int(at * count))
            sums[column] += known
            numbers[column] += 1
    return [total / number if number else None for total, number in zip(sums, numbers, strict=True)]


def _runs(columns: Sequence[float | None], top: float, count: int) -> Iterable[tuple[str, int, int]]:
    """For each stretch that is known: the path along its top, its first column and its last."""
    run: list[str] = []
    first = 0
    for at, known in enumerate([*columns, None]):
        if known is not None:
            if not run:
                first = at
            y = round(HEIGHT * (1 - min(known, top) / top), 1)
            run.append(f"{'L' if run else 'M'}{_x(at, count)},{y:g}")
            if at + 1 == len(columns) or columns[at + 1] is None:
                run.append(f"L{_x(at + 1, count)},{y:g}")
        elif run:
            yield "".join(run), first, at - 1
            run = []


def _gaps(columns: Sequence[float | None], seconds: float, step: float) -> Iterable[tuple[float, float]]:
    """x and width of each stretch that is not known, without one at the end that is only not here yet."""
    count, start = len(columns), 0
    for at, known in enumerate([*columns, 0.0]):
        if known is not None:
            brief = (at - start) * seconds / count < BRIEF + step
            if at > start and not (brief and at == count):
                yield round(start * WIDTH / count, 1), round((at - start) * WIDTH / count, 1)
            start = at + 1


def _x(column: int, count: int) -> str:
    return f"{round(column * WIDTH / count, 1):g}"


def _of(name: str) -> Value:
    return lambda point: point.get(name)


def _used(name: str) -> Value:
    return lambda point: point.get("node", {}).get(name)


def _size(text: str | None) -> float:
    return float(parse_size(text)) if text else 0.0


def _percent(value: float) -> str:
    return f"{value:.0f} %"


def _cores(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:.0f}"


def _bytes(value: float) -> str:
    return format_size(int(value))
