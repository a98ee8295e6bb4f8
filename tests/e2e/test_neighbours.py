"""One session takes all that it can get; its neighbours, and the machine, have what is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recorder import Recorder
from tests.stack import Stack, User, wait_for

PIDS = 4096  # of a session, by default
# Forks until it is refused, says so, and goes on trying.
BOMB = """
import os, signal
while True:
    try:
        if not os.fork():
            signal.pause()
    except OSError:
        open("full", "w").close()
"""
FLOOD = "yes 'all work and no play makes Jack a dull boy' | head -c 400000000; echo done > flooded; sleep 1000"


def detached(user: User, *words: str) -> str:
    done = user.beaker("session", "create", "--gpus", "0", "--detach", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


@pytest.fixture
def neighbour(ada: User) -> Iterator[str]:
    """A session of ada's, which is the same and answers before and after."""
    id = detached(ada, "--", "sh", "-c", "echo $$ > here; sleep 1000")

    def alive() -> bool:
        return ada.beaker("session", "exec", id, "--", "sh", "-c", "kill -0 $(cat here) && echo yes").stdout == b"yes\n"

    wait_for("the neighbour", alive)
    yield id
    assert alive()
    (ada.home / "here").unlink()


@pytest.mark.usefixtures("neighbour")
def test_a_fork_bomb_stays_in_its_session(ada: User, bob: User, recorder: Recorder):
    bomb = detached(bob, "--", "python3", "-c", BOMB)
    wait_for("its limit", (bob.home / "full").exists, 120)
    done = ada.beaker("session", "create", "--gpus", "0", "--", "echo", "new")
    assert (done.returncode, done.stdout) == (0, b"new\n"), done.stderr
    assert bob.beaker("session", "stop", bomb).returncode == 0
    most = max(box.processes for sample in recorder.history for id, box in sample.boxes if id == bomb)
    assert PIDS // 2 < most <= PIDS
    (bob.home / "full").unlink()


@pytest.mark.usefixtures("neighbour")
def test_a_memory_hog_ends_alone(ada: User, bob: User):
    hog = "x = []\nwhile True: x.append(bytearray(1 << 20))"
    done = bob.beaker("session", "create", "--gpus", "0", "--memory", "256MiB", "--", "python3", "-c", hog)
    assert (done.returncode, b"out of memory" in done.stderr) == (137, True)
    assert ada.beaker("session", "create", "--gpus", "0", "--", "true").returncode == 0


@pytest.mark.usefixtures("neighbour")
def test_a_flood_of_output_is_not_kept(stack: Stack, bob: User):
    """Nobody reads it, and nobody may write hundreds of megabytes to the machine's disk by it."""
    id = detached(bob, "--", "sh", "-c", FLOOD)
    wait_for("the end of the flood", (bob.home / "flooded").exists, 120)
    wait_for("a short log", lambda: 0 < sum(file.stat().st_size for file in logs(stack, id)) < 32 << 20, 60)
    assert bob.beaker("session", "exec", id, "--", "echo", "alive").stdout == b"alive\n"
    assert b"Jack" in bob.beaker("session", "logs", id).stdout[-1000:]
    (bob.home / "flooded").unlink()


def logs(stack: Stack, id: str) -> list[Path]:
    if stack.driver == "oci":
        return list((stack.state / "executor/oci/sessions" / id).glob("log*"))
    return list((stack.root / "docker/containers").glob("*/*-json.log*"))
