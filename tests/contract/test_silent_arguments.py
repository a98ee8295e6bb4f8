"""A process whose memory nobody can read: whoever wants its arguments waits in the kernel, as `ps` does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.silent import HOSTILE
from tests.stack import wait_for

USER = 4711
READERS = {
    "forwarders": "from beaker_sessions.executor import forwarding; forwarding.running()",
    "remains": "from pathlib import Path; from beaker_sessions.sandbox.oci.processes import mentioning\n"
    "mentioning(Path('/no/such'))",
    "versions": "from pathlib import Path; from setup import installed; installed._in_use(Path('/no/such'))",
}
DIE = ["setpriv", "--pdeathsig", "KILL"]  # else it would hold up the machine's every `ps`, should this be killed


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[int]:
    if os.geteuid() != 0 or not os.path.exists("/dev/fuse"):
        pytest.skip("needs root and FUSE")
    server = subprocess.Popen([*DIE, sys.executable, "-m", "tests.silent", str(tmp_path)])
    process = None
    try:
        wait_for("the file system", lambda: (tmp_path / "file").exists())
        for directory in tmp_path.parents[:3]:  # of pytest, for root alone
            directory.chmod(0o755)
        user = [f"--reuid={USER}", f"--regid={USER}", "--clear-groups"]
        command = [*DIE, *user, "/usr/bin/python3", "-c", HOSTILE, str(tmp_path / "file")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout
        assert process.stdout.read(5) == b"ready"
        yield process.pid
    finally:
        server.send_signal(signal.SIGKILL)  # first: it frees whoever waits
        server.wait()
        subprocess.run(["umount", "--lazy", tmp_path], check=False)
        if process:
            process.kill()
            process.communicate()


def test_nobody_waits_for_a_user_s_memory(hostile: int) -> None:
    """The executor's loop, and `make session`, waited until the machine was restarted."""
    look = [sys.executable, "-c", f"open('/proc/{hostile}/cmdline', 'rb').read()"]
    one = subprocess.Popen(look)
    with pytest.raises(subprocess.TimeoutExpired):
        one.wait(3)  # else it is no attack
    one.kill()
    one.wait()
    readers = {name: subprocess.Popen([sys.executable, "-c", code]) for name, code in READERS.items()}
    stuck = []
    for name, reader in readers.items():
        try:
            assert reader.wait(20) == 0, name
        except subprocess.TimeoutExpired:
            stuck.append(name)
            reader.kill()  # which has an effect when the file system is gone
    assert not stuck
