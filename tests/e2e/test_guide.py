"""The commands of the guide, run as they stand there, in its order."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import BIN, REPOSITORY, User

GUIDE = REPOSITORY / "docs/interactive.md"
BLOCK = re.compile(r"^ *```\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
ELSEWHERE = {
    "beaker session create": "needs a terminal: test_session does it in one",
    "beaker session create --image pytorch/pytorch:latest": "needs a registry: the contract tests have one",
}


def commands() -> list[str]:
    lines = [line.strip() for block in BLOCK.findall(GUIDE.read_text()) for line in block.splitlines()]
    return [line for line in lines if line.startswith(("beaker ", "git "))]


@pytest.fixture
def home(ada: User) -> Iterator[Path]:
    """What the guide takes for granted: files of one's own."""
    before = set(ada.home.iterdir())
    (ada.home / "numbers.txt").write_text("2\n1\n")
    (ada.home / "train.py").write_text("import os; print(len(os.environ['WANDB_API_KEY']))")
    yield ada.home
    for path in set(ada.home.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_the_commands_of_the_guide(ada: User, home: Path):
    found = commands()
    assert set(ELSEWHERE) <= set(found), "the guide says it differently now"
    printed = {}
    for line in (line for line in found if line not in ELSEWHERE):
        # What asks is given an answer by a pipe.
        done = ada.run("bash", "-c", line, input=b"a-key", env={"PATH": f"{BIN}:{ada.env['PATH']}"})
        assert done.returncode == 0, (line, done.stderr)
        printed[line.partition(" -- ")[2] or line] = done.stdout
    assert printed["python3 --version"].startswith(b"Python 3")
    assert (home / "sorted.txt").read_bytes() == b"1\n2\n"
    assert printed["python3 train.py"] == b"5\n"
    assert b"WANDB_API_KEY" in printed["beaker secret list"]
    assert (home / ".gitconfig").read_text().count("Ada Lovelace") == 1
