"""Which images a prune removes: never one that is needed, and no more than was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor.images import limits, surplus
from beaker_sessions.sandbox import Limits
from beaker_sessions.settings import ExecutorSettings

NOW = datetime(2030, 1, 31, tzinfo=UTC)
DAY = 86400.0


@dataclass(frozen=True)
class Kept:
    id: str
    size: int
    used: datetime
    names: tuple[str, ...] = ()


def kept(days: int, size: int = 10) -> Kept:
    """An image that was used so many days ago, which is its id."""
    return Kept(str(days), size, NOW - timedelta(days=days))


@pytest.mark.parametrize(
    ("older", "keep", "needed", "removed"),
    [
        (None, None, (), ["9", "5", "1"]),
        (None, None, ("5",), ["9", "1"]),
        (4 * DAY, None, (), ["9", "5"]),
        (4 * DAY, None, ("9",), ["5"]),
        (None, 30, (), []),
        (None, 20, (), ["9"]),
        (None, 19, (), ["9", "5"]),
        (None, 0, ("9", "5", "1"), []),
        (8 * DAY, 10, (), ["9", "5"]),
        (99 * DAY, 30, (), []),
    ],
)
def test_prune_removes_the_longest_unused_first(
    older: float | None, keep: int | None, needed: Sequence[str], removed: list[str]
) -> None:
    stored = [kept(1), kept(5), kept(9)]
    assert [image.id for image in surplus(stored, set(needed), older, keep, NOW)] == removed


def test_limits_are_of_the_settings_and_generous_without() -> None:
    assert limits(ExecutorSettings()) == Limits(200 << 30, 0)
    assert limits(ExecutorSettings(image_size="", image_space="2TiB")) == Limits(0, 2 << 40)
    for wrong in (ExecutorSettings(image_size="much"), ExecutorSettings(image_space="80 %")):
        with pytest.raises(Error) as error:
            limits(wrong)
        assert (error.value.code, "image" in error.value.message) == ("invalid", True)
