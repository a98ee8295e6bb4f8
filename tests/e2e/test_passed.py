"""Descriptors whose close takes as long as their author likes: everybody else is served as before."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.e2e.test_flood import ASK, outsider, started
from tests.stack import REPOSITORY, Stack, User

SECONDS = 15.0

# Passes so many copies of a TCP socket that lingers with unsent data, and keeps none. `unread`: in a second frame too.
LINGER = """
import socket, struct, sys
path, how, request = sys.argv[1:4]
listening = socket.create_server(("127.0.0.1", 0))
sender = socket.create_connection(listening.getsockname())
other, _ = listening.accept()
sender.setblocking(False)
try:
    while True:
        sender.send(b"x" * 65536)
except BlockingIOError:
    pass
sender.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 90))
passed = sender
if how == "queued":
    passed, far = socket.socketpair()
    socket.send_fds(far, [b"x"], [sender.fileno()])
    sender.close()
    far.close()
door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
door.connect(path)
try:
    socket.send_fds(door, [request.encode()], [passed.fileno()] * (3 if how == "surplus" else 1))
    if how == "unread":
        for _ in range(3):
            socket.send_fds(door, [b""], [passed.fileno()])
except (PermissionError, ConnectionError):  # it is refused, or answered already; to close it here would take as long
    pass
else:
    passed.close()
if how == "left":
    door.close()
print("passed", flush=True)
sys.stdin.read()
"""

# Passes a file of a file system that does not answer.
STUCK = """
import os, signal, socket, sys
path, file, daemon, uid, request = sys.argv[1:6]
stuck = os.open(file, os.O_RDONLY)
os.kill(int(daemon), signal.SIGSTOP)
os.setgroups([])
os.setuid(int(uid))
for _ in range(8):
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.connect(path)
    socket.send_fds(door, [request.encode()], [stuck])
print("passed", flush=True)
sys.stdin.read()
"""


@contextmanager
def passing(command: list[str], **options: object) -> Iterator[None]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, **options) as process:  # type: ignore[call-overload]
        try:
            assert process.stdout.readline() == b"passed\n"
            yield
        finally:
            process.kill()


def served(stack: Stack) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
        probe.settimeout(SECONDS)
        try:
            probe.connect(str(stack.socket))
            probe.sendall(json.dumps({"v": 1, "op": "node", "token": stack.admin.token}).encode())
            return "node" in json.loads(probe.recv(1 << 17))
        except TimeoutError:
            return False


@pytest.mark.parametrize("how", ["first", "surplus", "unread", "left", "queued"])
def test_a_socket_that_lingers_holds_nobody_up(stack: Stack, bob: User, how: str):
    for request in ({"v": 1, "op": "list", "token": bob.token}, {"v": 1, "op": "nonsense"}):
        command = [sys.executable, "-c", LINGER, str(stack.socket), how, json.dumps(request)]
        with passing(command, **bob.process()):
            for _ in range(3):
                assert served(stack)
                time.sleep(0.2)  # for what is closed a little later


def test_a_socket_that_lingers_from_inside_a_session_holds_nobody_up(stack: Stack, ada: User):
    id = started(ada, "--", "sleep", "1000")
    for how in ("first", "unread", "left", "queued"):
        request = json.dumps({"v": 1, "op": "get"})
        enter = ["nsenter", f"--target={stack.sandboxes()[id]}", "--mount", "--pid", "--net", "--"]
        with passing([*enter, "python3", "-c", LINGER, "/run/beaker/session.sock", how, request]):
            for _ in range(3):
                assert served(stack)
                time.sleep(0.2)
    assert outsider(id, stack, ASK, f"--pid=/proc/{stack.sandboxes()[id]}/ns/pid") == id


@pytest.fixture
def fuse(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A file of a FUSE file system, and the process that serves it."""
    if not Path("/dev/fuse").exists():
        pytest.skip("needs FUSE")
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "file").write_text("x")
    command = [sys.executable, "-m", "tests.squash", str(source), str(target)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    try:
        assert process.stdout
        assert process.stdout.readline() == b"mounted\n"
        yield target / "file", process
    finally:
        process.kill()  # which ends its connection: what waits for it goes on
        process.communicate()
        subprocess.run(["umount", "--lazy", str(target)], check=False)


def test_a_file_system_that_does_not_answer_holds_nobody_up(
    stack: Stack, bob: User, fuse: tuple[Path, subprocess.Popen[bytes]]
):
    file, daemon = fuse
    request = json.dumps({"v": 1, "op": "nonsense"})
    command = [sys.executable, "-c", STUCK, str(stack.socket), str(file), str(daemon.pid), str(bob.uid), request]
    with passing(command):
        try:
            for _ in range(3):
                assert served(stack)
                time.sleep(0.2)
            assert bob.beaker("session", "create", "--gpus", "0", "--", "echo", "served").stdout == b"served\n"
        finally:
            with suppress(ProcessLookupError):
                os.kill(daemon.pid, signal.SIGKILL)
