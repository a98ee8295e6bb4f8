"""A full disk of the node: new sessions are refused with the reason, live ones do not notice, and it passes."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.stack import Stack, wait_for


@pytest.fixture
def stack(debian: Path) -> Iterator[Stack]:
    """A stack whose state is on a file system of 16 MiB."""
    root = Path(tempfile.mkdtemp(prefix="beaker-"))
    root.chmod(0o755)
    state = root / "state"
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=755", "tmpfs", state], check=True)
    stack = Stack(root, settings={"defaultImage": "debian"})
    try:
        stack.start()
        stack.image("debian", debian)
        yield stack
    finally:
        stack.executor.kill()
        stack.server.kill()
        subprocess.run(["umount", "--lazy", state], check=True)
        stack.close()


def test_a_full_disk_refuses_new_sessions_and_spares_live_ones(stack: Stack):
    user = stack.user("dora")
    create = ("session", "create", "--gpus", "0")
    live = user.beaker(*create, "--detach", "--", "sleep", "1000").stdout.decode().strip()
    filler = stack.state / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):  # whole blocks, so that no room is left in between
            pass
    done = user.beaker(*create, "--", "true")
    assert (done.returncode, done.stdout) == (74, b""), done.stderr
    assert b"full" in done.stderr
    assert user.beaker("session", "exec", live, "--", "echo", "alive").stdout == b"alive\n"
    filler.unlink()
    wait_for("room again", lambda: user.beaker(*create, "--", "true").returncode == 0)
    assert user.beaker("session", "stop", live).returncode == 0
