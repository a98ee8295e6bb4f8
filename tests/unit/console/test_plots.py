"""Plots: what is unknown is a gap, never a line at zero."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from beaker_sessions.server.console import plots
from tests.browser import Browser
from tests.lab import Lab

START = 1_700_000_000.0


def answer(values: dict[int, float | None], step: int = 60) -> dict:
    """Points at these steps."""
    at = lambda number: datetime.fromtimestamp(START + number * step, UTC).isoformat()  # noqa: E731
    data = [{"at": at(n), "node": {} if value is None else {"cpu": value}} for n, value in sorted(values.items())]
    return {"step": step, "data": data}


def plot(values: dict[int, float | None], steps: int, last: dict | None = None, top: float = 4.0) -> plots.Plot:
    def cpu(point: Mapping[str, Any]) -> float | None:
        return point.get("node", {}).get("cpu")

    end = START + 60 * steps
    return plots.plot("CPUs", answer(values), START, end, cpu, top, lambda v: f"{v:g}", last=last)


def test_a_line_from_the_first_to_the_last_point() -> None:
    drawn = plot({0: 0, 1: 4, 2: 2}, 3)
    assert drawn.line == "M0,60L200,0L400,30L600,30"
    assert (drawn.gaps, drawn.words) == ((), "mean 2, highest 4")


def test_the_value_of_now_is_the_last_sample_and_no_mean() -> None:
    assert plot({0: 1, 1: 1}, 2, {"node": {"cpu": 3}}).now == "3"
    assert plot({0: 1, 1: 1}, 2, {}).now == "", "nobody knows"
    assert plot({0: 1, 1: 1}, 2).now is None, "it has ended"


def test_where_there_is_no_most_the_highest_is_not_the_top() -> None:
    assert [plot({0: value}, 1, top=0).top for value in (0, 3, 64, 100)] == ["2", "4", "128", "128"]


def test_what_is_not_reported_is_a_gap() -> None:
    drawn = plot({0: 4, 1: None, 2: 2, 5: 4}, 6)
    assert drawn.gaps == ((100, 100), (300, 200))
    assert drawn.line.count("M") == 3
    assert ",60" not in drawn.line, "nothing is drawn at zero"
    assert drawn.words.endswith("unreported for 3 min")


def test_nothing_is_one_gap_and_a_later_end_is_one_too() -> None:
    drawn = plot({}, 10)
    assert (drawn.gaps, drawn.line, drawn.words) == (((0, 600),), "", "nothing reported")
    assert plot({0: 1, 1: 1}, 4).gaps == ((300, 300),)


def test_more_than_expected_fits() -> None:
    drawn = plot({0: 8, 1: 4}, 2)
    assert drawn.top == "8"
    assert drawn.line == "M0,0L300,30L600,30"


def test_a_month_has_no_more_columns_than_a_day() -> None:
    many = {number: float(number % 5) for number in range(5000)}
    assert plot(many, 5000).line.count("L") <= plots.COLUMNS


def test_use_is_seen_on_the_pages(lab: Lab, ann: Browser) -> None:
    node = lab.node("gpu-1", 3)
    id = node.session("ann", (0,), age=1200)
    others = node.session("bob", (1,), age=1200)
    gpus = {node.gpus[0]: {"use": 71, "memory": 1 << 36, "total": 1 << 37}, node.gpus[2]: {"use": 40}}
    for ago in range(600, 0, -20):
        at = (datetime.now(UTC) - timedelta(seconds=ago - 19)).isoformat()
        sessions = {id: {"cpu": 3.25, "memory": 1 << 33} | ({"disk": 3 << 30} if ago < 300 else {})}
        node.beat(samples=[{"at": at, "node": {"cpu": 2}, "gpus": gpus, "sessions": sessions}])
    html = ann.get("/cl/lab/main").text
    assert '<li class="gpu mine u14">' in html
    assert "71 % busy" in html
    assert '<li class="gpu held blind">' in html, "no sample is no utilisation of 0"
    assert "2: free, 40 % busy" in html, "busy though nobody holds it"
    html = ann.get("/node/gpu-1?hours=1").text
    assert 'aria-label="GPU 0: mean 71 %, highest 71 %, unreported' in html
    assert 'aria-label="GPU 1: nothing reported"' in html
    assert "3.2 CPUs, 8GiB memory, 3GiB disk</td>" in html
    assert html.count('<span class="unsure">unknown</span></td>') == 1, "bob's session says nothing"
    html = ann.get(f"/job/{id}").text
    assert re.search(r'aria-label="Disk: mean 3GiB, highest 3GiB, unreported for 1', html), "unknown before, not zero"
    assert "Disk" not in ann.get(f"/job/{others}").text
    assert re.search(r'aria-label="CPUs: mean 3\.2', html)
    assert "GPU 1" not in html
    node.silent()
    assert "71 % busy" not in ann.get("/cl/lab/main").text
    assert "Nothing was reported in the last 24 h" in ann.get(f"/node/{lab.node('gpu-2', 1).id}").text
