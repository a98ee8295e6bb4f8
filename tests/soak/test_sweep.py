"""The executor killed once at each place of its code; `make soak SWEEP=1` kills it at every event."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from .node import node
from .sweep import OPERATIONS, Swept, sweep


@pytest.fixture(scope="module")
def swept() -> Iterator[Swept]:
    if os.geteuid() != 0:
        pytest.skip("needs root: it starts executors")
    if not shutil.which("docker-registry"):
        pytest.skip("needs docker-registry")
    with node() as made:
        yield Swept(made, made.user("ada"))


@pytest.fixture(scope="module")
def seen() -> set[tuple[str, ...]]:
    """The places that have had their turn."""
    return set()


@pytest.mark.parametrize("name", OPERATIONS)
def test_killed_at_each_place(swept: Swept, seen: set[tuple[str, ...]], name: str) -> None:
    operation = OPERATIONS[name](swept)
    try:
        result = sweep(operation, False, print, seen)
    finally:
        operation.close()
    assert result.wrong == []
    assert result.killed, "the test tests nothing"
