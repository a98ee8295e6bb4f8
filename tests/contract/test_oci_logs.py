"""Output without end: the files that keep the last of it, while conmon writes as fast as it can."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.sandbox import Status
from beaker_sessions.sandbox.oci import logs
from tests.stack import wait_for

from .conftest import SECONDS, Maker, OciLab

LINES = 700_000  # each is eight bytes of output and 52 of log: 8 logs
GAP = f"[{logs.LOST}]\r\n".encode()
LAST = b"".join(b"%07d\n" % number for number in range(LINES - 200_000, LINES))


@pytest.fixture
def make(oci_lab: OciLab) -> Iterator[Maker]:
    maker = Maker(oci_lab)
    yield maker
    maker.close()


@pytest.fixture
def watched(oci_lab: OciLab) -> Iterator[None]:
    """As an executor does that runs."""
    watch = oci_lab.sandboxes.watch()
    next(watch)
    done = threading.Event()

    def follow() -> None:
        for _ in watch:
            if done.is_set():
                watch.close()
                return

    thread = threading.Thread(target=follow)
    thread.start()
    yield
    done.set()
    oci_lab.sandboxes._tell("done")
    thread.join()


def flood(make: Maker) -> tuple[str, int]:
    """A sandbox that prints LINES numbers and ends: its id, and the most that its logs had in bytes."""
    spec = make.spec("seq", "-f", "%07.0f", "0", str(LINES - 1), image="debian", stdin=False)
    make.start(spec).close()
    directory, most = make.lab.state / "sessions" / spec.id, 0
    while next(found for found in make.lab.sandboxes.list() if found.id == spec.id).status is not Status.EXITED:
        most = max(most, held(directory))
    return spec.id, max(most, held(directory))


def held(directory: Path) -> int:
    sizes = {}
    for path in directory.glob("log*"):
        with contextlib.suppress(FileNotFoundError):
            sizes[path.stat().st_ino] = path.stat().st_size
    return sum(sizes.values())


@pytest.mark.usefixtures("watched")
def test_a_flood_never_has_more_than_the_limit_and_its_end_is_kept(make: Maker) -> None:
    id, most = flood(make)
    assert most <= logs.LIMIT
    text = make.lab.sandboxes.logs(id, 1 << 20)
    text = text.rpartition(GAP)[2]  # on a machine that is very busy
    assert LAST.endswith(text)
    assert len(text) > 1000


def test_nor_while_no_executor_is_there(make: Maker) -> None:
    id, most = flood(make)
    assert most <= logs.LIMIT
    before, said, after = make.lab.sandboxes.logs(id, 1 << 20).partition(b"\r\n" + GAP)
    assert said
    assert before
    assert LAST.endswith(after)


@pytest.mark.usefixtures("watched")
def test_coming_back_to_a_flood_shows_it_without_a_gap(make: Maker) -> None:
    spec = make.spec("seq", "-f", "%07.0f", "0", "9999999", image="debian", stdin=False)
    make.start(spec).close()
    wait_for("output", lambda: len(make.lab.sandboxes.logs(spec.id, 1 << 20)) == 1 << 20)
    for _ in range(4):
        terminal = make.lab.sandboxes.attach(spec.id, replay=True)
        stream = make.stream(terminal)
        while len(stream.out) < 100_000:
            assert select.select([terminal.fd], [], [], SECONDS)[0]
            stream._take(os.read(terminal.fd, 1 << 17))
        stream.close()
        _, lost, replay = terminal.replay.rpartition(GAP)  # on a machine that is very busy
        lines = (replay + stream.out).partition(b"\n")[2].split(b"\n")[:-1]
        assert [int(line) for line in lines] == list(range(int(lines[0]), int(lines[0]) + len(lines)))
        assert lost or len(replay) >= 60_000
