"""Which processes leave the executor's control group, on both versions. On a machine with systemd: `tests/units.sh`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.sandbox import delegated

EXECUTOR, FORMER = "beaker.slice/beaker-executor.service", "system.slice/beaker-executor.service"
LINES = {"": "0::/{}\n", "systemd": "4:memory:/\n1:name=systemd:/{}\n"}  # version 2 alone, and 1


@pytest.fixture(params=LINES)
def tree(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hierarchy in which systemd keeps its units."""
    monkeypatch.setattr(delegated, "MOUNTED", tmp_path / "cgroup")
    monkeypatch.setattr(delegated, "OWN", tmp_path / "own")
    delegated.OWN.write_text(LINES[request.param].format(EXECUTOR))
    delegated.holders.cache_clear()
    tree = tmp_path / "cgroup" / request.param
    tree.mkdir(parents=True)
    yield tree
    delegated.holders.cache_clear()


def test_without_the_unit_nothing_is_moved(tree: Path) -> None:
    assert (delegated.base(), delegated.holders()) == ("", ())
    delegated.hold(os.getpid())
    assert not list(tree.iterdir())


def test_what_an_executor_left_is_taken_over_and_not_the_new_one(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / delegated.UNIT).mkdir(parents=True)
    assert delegated.base() == f"/{delegated.UNIT}"
    assert delegated.holders() == (tree / delegated.UNIT / "holders/cgroup.procs",)
    for group, pids in ((EXECUTOR, f"{os.getpid()}\n7\n8\n"), (FORMER, "9\n")):
        (tree / group).mkdir(parents=True)
        (tree / group / "cgroup.procs").write_text(pids)
    moved: list[int] = []
    monkeypatch.setattr(delegated, "hold", moved.append)
    delegated.take_over()
    assert sorted(moved) == [7, 8, 9]
    moved.clear()
    delegated.OWN.write_text(delegated.OWN.read_text().replace(EXECUTOR, "user.slice/session-1.scope"))
    delegated.take_over()
    assert moved == [], "an executor that somebody started by hand"
