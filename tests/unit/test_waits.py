"""What waits for an executor that is stopped or stuck says so, ends, and goes on if it comes back: a real door."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from beaker_sessions.cli.door import DEAD
from tests.stack import wait_for
from tests.unit.test_cli_follow import PYTHON, ROOT, FakeDoor, Shell

SECONDS = 60.0
CREATE = ("session", "create", "--bare", "--gpus", "0")
# The same waits in less time. Long enough that a machine under load is not taken for one whose executor is stopped.
SHORT = (
    "import beaker_sessions.cli.door as d, beaker_sessions.cli.follow as f; "
    "import os; os.geteuid = lambda: 1000; "  # root's doctor would look at the machine without an executor
    "d.QUIET = f.QUIET = 1.0; d.SILENT = 2.0; d.ANSWER = f.ANSWER = 8.0; f.PATIENCE = 1.0"
)


class Node:
    """An executor in a process, and the command line before it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory, self._stack = directory, stack
        self.socket = directory / "door"
        self.env = {
            "HOME": str(directory), "PATH": os.environ["PATH"], "BEAKER_TOKEN": "t", "BEAKER_SOCKET": str(self.socket),
            "BEAKER_ADDR": "http://127.0.0.1:1",
        }  # fmt: skip
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.node", str(self._directory)]
        self.executor = self._stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        )
        self._stack.callback(self.executor.kill)
        assert self.executor.stdout
        assert self.executor.stdout.readline() == b"serves\n"

    def beaker(self, *words: str, patch: str = SHORT) -> subprocess.Popen[bytes]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [*PYTHON[:-1], PYTHON[-1].replace("; main()", f"; {patch}; main()"), *words]
        it = self._stack.enter_context(
            subprocess.Popen(command, env=self.env, start_new_session=True, bufsize=0, **pipes)
        )
        self._stack.callback(it.kill)
        return it

    def shell(self, *words: str, patch: str = SHORT) -> Shell:
        it = Shell({**self.env, "TERM": "xterm"}, *words, patch=patch)
        self._stack.callback(it.close)
        return it

    def done(self, *words: str) -> tuple[int, bytes, bytes]:
        it = self.beaker(*words, patch="pass")
        out, errors = it.communicate(timeout=SECONDS)
        return it.returncode, out, errors

    def jobs(self, *words: str) -> list[dict[str, Any]]:
        code, out, errors = self.done("session", "list", "--format", "json", *words)
        assert code == 0, errors
        jobs: list[dict[str, Any]] = json.loads(out)
        return jobs

    def signal(self, number: signal.Signals) -> None:
        self.executor.send_signal(number)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with ExitStack() as stack:
        yield Node(tmp_path, stack)


def said(it: subprocess.Popen[bytes]) -> str:
    """The next line that a command says."""
    assert it.stderr
    return it.stderr.readline().decode()


# -- detached


def test_detaching_prints_the_id_also_of_what_has_ended_meanwhile(node: Node) -> None:
    for command in ("true", "false", "sleep"):
        for _ in range(5):
            code, out, errors = node.done(*CREATE, "--detach", "-q", "--", command)
            assert (code, len(out), errors) == (0, 27, b"")
    code, out, errors = node.done(*CREATE, "--detach", "--format", "json", "-q", "--", "false")
    assert (code, list(json.loads(out)), errors) == (0, ["id"], b"")
    code, out, errors = node.done(*CREATE, "--detach", "--image", "nowhere", "-q", "--", "true")
    assert (code, out) == (66, b""), errors
    assert b"there is no image nowhere" in errors


def test_detaching_ends_when_the_session_waits_in_the_queue(node: Node) -> None:
    for _ in range(2):
        code, out, errors = node.done("session", "create", "--bare", "--gpus", "1", "--detach", "-q", "--", "sleep")
        assert (code, len(out), errors) == (0, 27, b"")


# -- an executor that is stopped


WAITING: dict[str, tuple[str, ...]] = {
    "list": ("session", "list"),
    "stop": ("session", "stop", "one"),
    "doctor": ("executor", "doctor"),
    "create": (*CREATE, "--", "true"),
    "detach": (*CREATE, "--detach", "--", "true"),
    "exec": ("session", "exec", "one", "--", "true"),
    "attach": ("session", "attach", "one"),
}


def test_a_script_is_told_that_the_executor_does_not_answer_and_ends(node: Node) -> None:
    assert node.done(*CREATE, "--detach", "--name", "one", "--", "sleep")[0] == 0
    node.signal(signal.SIGSTOP)
    commands = {name: node.beaker(*words) for name, words in WAITING.items()}
    for name, it in commands.items():
        assert said(it).startswith("The executor of this machine does not answer; still waiting"), name
        _, errors = it.communicate(timeout=SECONDS)
        assert it.returncode == 69, (name, errors)
        why = b"it may have run" if name == "exec" else b"the executor of this machine does not answer"
        assert why in errors, (name, errors)
    node.signal(signal.SIGCONT)
    assert node.done("session", "stop", "one")[0] == 0
    assert [job["name"] for job in node.jobs("--finalized")] == ["one"], "who gave up has no session"
    assert node.jobs() == []


def test_all_go_on_when_it_comes_back(node: Node) -> None:
    assert node.done(*CREATE, "--detach", "--name", "one", "--", "sleep")[0] == 0
    node.signal(signal.SIGSTOP)
    names = ("list", "create", "detach", "exec")
    commands = [node.beaker(*WAITING[name], patch=f"{SHORT}; f.PATIENCE = d.SILENT = 60.0") for name in names]
    for it in commands:
        assert said(it).startswith("The executor of this machine does not answer")
    node.signal(signal.SIGCONT)
    for it in commands:
        _, errors = it.communicate(timeout=SECONDS)
        assert it.returncode == 0, errors


def test_a_person_waits_as_long_as_they_like(node: Node) -> None:
    node.signal(signal.SIGSTOP)
    it = node.shell(*CREATE)
    it.expect(b"The executor of this machine does not answer; still waiting for it. (Press Ctrl+C to leave)")
    other = node.beaker(*CREATE, "--", "true")
    assert other.wait(SECONDS) == 69  # by then a script has given up
    assert it.process.poll() is None
    it.type(b"\x03")
    assert it.wait() == 130
    node.signal(signal.SIGCONT)
    assert node.jobs() == node.jobs("--finalized") == []


def test_a_queue_of_callers_that_is_full_is_no_different(node: Node, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door, ExitStack() as others:
        node.env["BEAKER_SOCKET"] = str(tmp_path / "full")
        door.bind(node.env["BEAKER_SOCKET"])
        door.listen(0)
        others.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)).connect(node.env["BEAKER_SOCKET"])
        for name in ("list", "create"):
            it = node.beaker(*WAITING[name])
            assert said(it).startswith("The executor of this machine does not answer"), name
            _, errors = it.communicate(timeout=SECONDS)
            assert (it.returncode, b"does not answer" in errors) == (69, True), errors


def test_the_end_of_a_session_is_not_waited_for_for_ever(node: Node, tmp_path: Path) -> None:
    """Its output has ended, and the executor, which knows its exit code, is stopped."""
    node.env["BEAKER_SOCKET"] = str(tmp_path / "other")
    door = FakeDoor(node.env["BEAKER_SOCKET"])
    try:
        it = node.beaker(*CREATE, "--", "cat")
        call, _ = door.call()
        call.send(event="created", job={"id": "01HW8DZJFR6QEAFAABCTCR2BY2"})
        call.terminal().close()
        _, errors = it.communicate(timeout=SECONDS)
        assert it.returncode == 69
        assert DEAD.encode() in errors
        assert b"come back with: beaker session attach 01HW8DZJFR6QEAFAABCTCR2BY2" in errors
    finally:
        door.close()


# -- one that is stuck


def test_an_executor_that_is_alive_and_never_answers_is_waited_for_longer(node: Node) -> None:
    it = node.beaker(
        *CREATE, "--name", "stuck", "--", "true", patch=f"{SHORT}; d.QUIET = f.QUIET = 3.0; f.ANSWER = 5.0"
    )
    assert said(it).startswith("Still waiting for the executor of this machine")
    _, errors = it.communicate(timeout=SECONDS)
    assert (it.returncode, b"does not answer" in errors) == (69, True), errors
    assert node.jobs() == []


def test_who_gives_a_size_to_what_has_just_ended_hears_its_exit_code(node: Node) -> None:
    assert node.done(*CREATE, "--detach", "--image", "ending", "--name", "one")[0] == 0
    it = node.shell("session", "attach", "one", patch="pass")
    wait_for("the terminal", it.is_raw)
    it.resize(30, 90)
    it.process.send_signal(signal.SIGWINCH)
    it.type(b"exit 3\r")
    assert it.wait() == 3


# -- Ctrl-C


@pytest.mark.parametrize("where", ["queued", "pulling", "starting"])
def test_control_c_ends_a_create_at_once_and_leaves_nothing(node: Node, where: str) -> None:
    if where == "queued":
        assert node.done("session", "create", "--bare", "--gpus", "1", "--detach", "-q", "--", "sleep")[0] == 0
        it = node.shell("session", "create", "--bare", "--gpus", "1", patch="pass")
        it.expect(b"Place in the queue: 1")
    elif where == "pulling":
        it = node.shell(*CREATE, "--image", "slow", patch="pass")
        it.expect(b"Pulling image")
    else:
        it = node.shell(*CREATE, "--image", "heavy", patch="pass")
        wait_for("the start", lambda: node.jobs() and node.jobs()[0]["status"].get("scheduled"))
    before = len(node.jobs())
    it.type(b"\x03")
    assert it.wait() == 130
    assert b"Canceled: session" in it.seen
    assert len(node.jobs()) == before - 1


@pytest.mark.parametrize("reads", [False, True])
def test_who_leaves_at_once_has_given_up_all_the_same(node: Node, reads: bool) -> None:
    """Ctrl-C twice: the executor learns that somebody has left while it tells them of the progress of their pull."""
    session = {"requests": {"gpuCount": 0}, "bare": True, "image": {"docker": "slow"}}
    request = {"v": 1, "op": "create", "token": "t", "key": "k", "session": session, "tty": False, "stdin": False}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.connect(str(node.socket))
        caller.send(json.dumps(request).encode())
        while reads and b"pull" not in caller.recv(1 << 17):
            pass
        wait_for("the session", node.jobs)
        caller.send(b'{"cancel": true}')
    wait_for("the end", lambda: node.jobs() == [], 20)


def test_who_left_before_their_turn_gets_no_session(node: Node) -> None:
    """Their process is still there: it is the connection that they gave up."""
    session = {"requests": {"gpuCount": 0}, "bare": True, "command": ["sleep"]}
    request = {"v": 1, "op": "create", "token": "t", "key": "k", "session": session, "tty": True, "stdin": False}
    node.signal(signal.SIGSTOP)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
        caller.connect(str(node.socket))
        caller.send(json.dumps(request).encode())
    node.signal(signal.SIGCONT)
    assert node.jobs() == []


# -- attached


def test_who_attaches_and_leaves_at_once_keeps_no_terminal(node: Node) -> None:
    """Nobody would read it, and the session would stand still once it is full."""
    files = Path(f"/proc/{node.executor.pid}/fd")

    def call(**request: object) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(node.socket))
        connection.send(json.dumps({"v": 1, "token": "t", "size": [24, 80], **request}).encode())
        return connection

    session = {"requests": {"gpuCount": 0}, "bare": True, "command": ["cat"]}
    with call(op="create", key="k", session=session, tty=True, stdin=True) as creates:
        descriptors: list[int] = []
        while not descriptors:
            _, descriptors, _, _ = socket.recv_fds(creates, 1 << 17, 1)
        with socket.socket(fileno=descriptors[0]) as terminal:
            terminal.sendall(b"some output\n")
            terminal.recv(100)
    (job,) = node.jobs()
    before = len(list(files.iterdir()))
    for _ in range(20):
        with call(op="attach", id=job["id"], whole=True) as leaves:
            leaves.recv(1 << 17)  # it is at it
    assert node.jobs()
    wait_for("every terminal to be closed", lambda: len(list(files.iterdir())) <= before)
