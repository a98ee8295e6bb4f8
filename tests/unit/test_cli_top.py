"""`session top`: what its picture says, and that the terminal is as before on every way out."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from beaker_sessions.cli import top

BEAKER = Path(sys.executable).parent / "beaker"
GPUS = [f"nvidia.com/gpu={number}" for number in range(3)]
NODE = {
    "hostname": "gpu-1.lab",
    "limits": {"gpuCount": 3, "gpuIds": GPUS, "cpuCount": 64, "memory": "512GiB"},
    "free": {"gpuCount": 1},
    "usage": {
        "node": {"cpu": 12.34},
        "gpus": {GPUS[0]: {"use": 70.0, "memory": 1 << 35, "total": 1 << 37}},
        "sessions": {"A": {"cpu": 3.2, "memory": 1 << 33}, "B": {"disk": 0}},
    },
}
STARTED = {"started": "2020-01-01T00:00:00Z"}
ANNS = {"id": "A", "name": "train", "author": {"name": "ann"}, "limits": {"gpus": GPUS[:1]}, "status": STARTED}
BOBS = {"id": "B", "author": {"name": "bob\x1b]"}, "limits": {"gpus": GPUS[1:2]}, "status": {}}


def test_the_picture() -> None:
    lines = top.picture(NODE, [ANNS, BOBS], [ANNS])
    assert lines[0].split("   ") == ["gpu-1.lab", "1 of 3 GPUs free", "CPU 12.3 of 64", "memory ? of 512GiB"]
    assert lines[2].split() == ["GPU", "0", "[#######...]", "70%", "32GiB", "of", "128GiB", "ann", "train"]
    assert lines[3].startswith("GPU 1   [??????????]    ?"), "unknown is not zero"
    assert lines[4].endswith("free")
    assert lines[7].split()[:8] == ["A", "train", "ann", "running", "1", "3.2", "8GiB", "?"]
    assert top.picture(NODE, [BOBS], [BOBS])[-1].split()[-3:] == ["?", "?", "0B"], "nothing written is known"
    assert not [line for line in lines[6:] if "bob" in line]
    assert top.picture({"limits": {}}, [], [])[-1] == "No sessions."


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A door that answers for that node; the environment of a command that finds it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "door"))
        listener.listen()

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    asked = connection.recv(1 << 17)
                    if not asked:
                        return
                    request = json.loads(asked)
                    jobs = [ANNS, BOBS] if request.get("all") else [ANNS]
                    frames = [{"node": NODE}] if request["op"] == "node" else [{"job": job} for job in jobs]
                    for frame in [*frames, {"end": True}][: 1 if request["op"] == "node" else None]:
                        connection.send(json.dumps(frame).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm", "LANG": "C.UTF-8"}
        yield environ | {"BEAKER_SOCKET": str(tmp_path / "door"), "BEAKER_TOKEN": "x"}
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
            last.connect(str(tmp_path / "door"))
        thread.join()


@pytest.mark.parametrize("end", ["q", "\x03", signal.SIGTERM])
def test_the_terminal_is_as_it_was(executor: dict[str, str], end: str | int) -> None:
    command = pexpect.spawn(
        "/bin/sh", ["-c", 'read _; exec "$0" session top --all', str(BEAKER)], env=executor, dimensions=(20, 100),
        encoding="utf-8", timeout=20,
    )  # fmt: skip
    before = termios.tcgetattr(command.child_fd)
    command.sendline()  # not before it was looked at
    command.expect("q ends this")
    assert "ann  train" in command.before
    assert "bob\\x1b]" in command.before
    assert termios.tcgetattr(command.child_fd) != before
    if isinstance(end, str):
        command.send(end)
    else:
        command.kill(end)
    command.expect(pexpect.EOF)
    assert "\x1b[?1049l" in command.before, "the screen from before is back"
    assert "\x1b[?25h" in command.before, "and the cursor"
    assert termios.tcgetattr(command.child_fd) == before
    command.close()
    assert command.exitstatus == 0


def test_without_a_terminal_it_is_told_once(executor: dict[str, str]) -> None:
    done = subprocess.run([BEAKER, "session", "top"], env=executor, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "train" in done.stdout
    told = subprocess.run([BEAKER, "session", "top", "--format", "json"], env=executor, capture_output=True, timeout=20)
    assert json.loads(told.stdout)["jobs"] == [ANNS]
