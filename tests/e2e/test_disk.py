"""A full disk of the node: new sessions are refused with the reason, live ones do not notice, and it passes.

An executor starts there, and people can look, stop and clean.
"""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests import images
from tests.stack import Stack, wait_for

SIZE = "24m"


@pytest.fixture(params=["docker", "oci"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    """A stack whose state, but for images, is on a small file system."""
    root = Path(tempfile.mkdtemp(prefix="beaker-"))
    root.chmod(0o755)
    state = root / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=755", "tmpfs", state], check=True)
    stack = Stack(root, driver=request.param, settings={"defaultImage": "small", "imagePath": str(root / "images")})
    try:
        stack.start()
        (tmp_path / "tar").write_bytes(images.alpine())
        stack.image("small", tmp_path / "tar")
        yield stack
    finally:
        stack.executor.kill()
        stack.server.kill()
        (state / "filler").unlink(missing_ok=True)
        stack.close()
        subprocess.run(["umount", "--lazy", state], check=True)
        shutil.rmtree(root)


def fill(stack: Stack) -> None:
    with (stack.state / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):  # whole blocks, so that no room is left in between
            pass


def test_a_full_disk_refuses_new_sessions_and_spares_live_ones(stack: Stack):
    user = stack.user("dora")
    create = ("session", "create", "--gpus", "0")
    words = (*create, "--detach", "--", "sh", "-c", "echo hello; sleep 1000")
    live = [user.beaker(*words).stdout.decode().strip() for _ in range(2)]
    wait_for("both", lambda: all(stack.sandboxes().get(id) for id in live))
    pids = stack.sandboxes()
    fill(stack)
    done = user.beaker(*create, "--", "true")
    assert (done.returncode, done.stdout) == (74, b""), done.stderr
    assert b"full" in done.stderr
    wait_for("its end", lambda: {job["id"] for job in user.json("session", "list")} == set(live))
    for killed in (True, False):
        stack.executor.kill(signal.SIGKILL if killed else signal.SIGTERM)
        if not killed:  # nothing is left that had room, as with an earlier version's
            (stack.state / "filler").unlink()
            with closing(sqlite3.connect(stack.state / "executor/ledger.db")) as db:
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            assert not (stack.state / "executor/ledger.db-wal").exists()
        fill(stack)
        stack.start_executor()
        assert {job["id"] for job in user.json("session", "list")} == set(live)
        assert stack.sandboxes() == pids
        one = live.pop()
        assert user.beaker("session", "logs", one).stdout.strip() == b"hello"
        done = user.beaker("session", "exec", one, "--", "echo", "alive")
        if stack.driver == "docker":  # whose state is on another disk
            assert done.stdout == b"alive\n"
        else:
            assert (done.returncode, str(stack.state / "executor/oci").encode() in done.stderr) == (74, True), done
        done = user.beaker("session", "stop", one)
        assert done.returncode == 0, done.stderr
        del pids[one]
        assert user.beaker("session", "logs", one).stdout.strip() == b"hello"
    (stack.state / "filler").unlink()
    wait_for("room again", lambda: user.beaker(*create, "--", "true").returncode == 0)
    stack.executor.kill()
    stack.start_executor()  # which lets others read the ledger again
