"""Waiting for the ends of sandboxes, with real processes for their conmons."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.sandbox.oci import logs, record, watch
from beaker_sessions.sandbox.oci.processes import Process
from tests.stack import wait_for

WITHOUT = """
import os, subprocess, sys
from pathlib import Path
from beaker_sessions.sandbox.oci import inotify, record, watch
from beaker_sessions.sandbox.oci.processes import Process

Path("/proc/sys/user/max_inotify_instances").write_text("0")
try:
    inotify.Renames()
    sys.exit("there are instances")
except OSError:
    pass
conmon = subprocess.Popen(["sleep", "1000"])
try:
    one = record.Record("one", {}, False, "", conmon=Process.of(conmon.pid))
    directory = Path(sys.argv[1])
    before = len(os.listdir("/proc/self/fd"))
    watched = watch.Watch(lambda: iter([(directory, one)]))
    ids = iter(watched)
    watched.tell("told")
    assert next(ids) == "told"
    conmon.kill()
    assert next(ids) == "one"
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == before
finally:
    conmon.kill()
"""


def test_ends_are_seen_when_the_machine_has_no_inotify_instance_left(tmp_path: Path) -> None:
    """The kernel charges those of sessions to root, whose 128 they can use up."""
    (tmp_path / "log").touch()
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def conmon() -> Iterator[Process]:
    process = subprocess.Popen(["sleep", "1000"])
    yield Process.of(process.pid)
    process.kill()
    process.wait()


def test_a_new_log_is_no_reason_to_look_at_all_sandboxes(
    tmp_path: Path, conmon: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "TRIM", 1000.0)
    one, looks = record.Record("one", {}, False, "", conmon=conmon), list[int]()
    (tmp_path / "log").touch()

    def sandboxes() -> Iterator[tuple[Path, record.Record]]:
        looks.append(1)
        yield tmp_path, one

    watched = watch.Watch(sandboxes)
    told = threading.Thread(target=lambda: next(iter(watched)), daemon=True)
    told.start()
    wait_for("it to watch", lambda: (tmp_path / "log.closed").exists())
    for number in range(5):
        (tmp_path / "new").write_text(f"{number}")
        (tmp_path / "new").rename(tmp_path / "log")
        inode = (tmp_path / "log").stat().st_ino
        wait_for("the one before to be put away", lambda: (tmp_path / "log.closed").stat().st_ino == inode)  # noqa: B023
    watched.tell("told")
    told.join(30)
    assert not told.is_alive()
    watched.close()
    assert len(looks) == 1


def test_logs_that_somebody_is_at_hold_nobody_up(tmp_path: Path) -> None:
    """Who comes back to a session holds its log for as long as conmon takes, and there are others to look at."""
    (tmp_path / "log").touch()
    with logs._locked(tmp_path):
        trimming = threading.Thread(target=logs.trim, args=(tmp_path,), daemon=True)
        trimming.start()
        trimming.join(5)
        assert not trimming.is_alive()
    logs.trim(tmp_path)
    assert (tmp_path / "log.closed").exists()
