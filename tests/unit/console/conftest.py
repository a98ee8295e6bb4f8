"""A lab, and browsers that are signed in to its console."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.lab import Lab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path) as lab:
        lab.account("ann")
        lab.account("bob", displayName="Bob \u202e<b>")
        yield lab


@pytest.fixture
def ann(lab: Lab) -> Browser:
    return Browser(lab).sign_in("ann")


@pytest.fixture
def bob(lab: Lab) -> Browser:
    return Browser(lab).sign_in("bob")


@pytest.fixture
def root(lab: Lab) -> Browser:
    return Browser(lab).sign_in("root")
