"""Who is warned of what they hold on the node's disk."""

from __future__ import annotations

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor import disk
from beaker_sessions.settings import ExecutorSettings

GIB = 1 << 30


def test_nobody_is_warned_while_there_is_room() -> None:
    assert disk.warnings({"A": 90 * GIB, "B": 0}, 0, free=500 * GIB, total=1000 * GIB) == {}


def test_the_largest_are_warned_when_the_disk_is_nearly_full() -> None:
    used = {"A": 5 * GIB, "B": 90 * GIB, "C": 7 * GIB, "D": 6 * GIB, "E": 1000}
    words = disk.warnings(used, 0, free=3 * GIB, total=1000 * GIB)
    assert set(words) == {"B", "C", "D"}
    assert "3GiB left" in words["B"]
    assert "90GiB" in words["B"]
    assert disk.warnings({"E": 1000}, 0, free=3 * GIB, total=1000 * GIB) == {}


def test_who_nears_the_limit_is_warned() -> None:
    words = disk.warnings({"A": 19 * GIB, "B": 10 * GIB}, 20 * GIB, free=500 * GIB, total=1000 * GIB)
    assert list(words) == ["A"]
    assert "19GiB" in words["A"]
    assert "20GiB" in words["A"]


def test_a_limit_that_is_no_size_is_an_error() -> None:
    assert disk.limit(ExecutorSettings(session_disk="1.5TiB")) == 3 << 39
    assert disk.limit(ExecutorSettings()) == 0
    with pytest.raises(Error, match="sessionDisk"):
        disk.limit(ExecutorSettings(session_disk="plenty"))
