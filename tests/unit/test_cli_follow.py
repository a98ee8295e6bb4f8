"""Sessions as a user sees them: the real command on a real pseudo-terminal, with a small real door behind it."""

from __future__ import annotations

import array
import base64
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from beaker_sessions.sandbox import framed

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-IS", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv[0] = 'beaker'"]
PYTHON[-1] += "; from beaker_sessions.cli.main import main; main()"
ID = "01HW8DZJFR6QEAFAABCTCR2BY2"
PATIENCE = 20.0
JOB = {"id": ID, "requests": {"gpuCount": 2}, "session": {"tty": True}, "status": {}}


class Call:
    """One connection to the door, in the test's hands."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.sockets = [connection]
        connection.settimeout(PATIENCE)

    def receive(self) -> Any:
        data = self.connection.recv(1 << 17)
        return json.loads(data) if data else None

    def send(self, *descriptors: int, **frame: Any) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.connection.sendmsg([json.dumps(frame).encode()], rights)

    def terminal(self, framing: str = "raw", **more: Any) -> socket.socket:
        """Hand over the terminal; returns the session's end."""
        kind = socket.SOCK_SEQPACKET if framing == "conmon" else socket.SOCK_STREAM
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        ours.settimeout(PATIENCE)
        self.send(theirs.fileno(), event="terminal", framing=framing, **{"handle": "", "replay": "", **more})
        theirs.close()
        self.sockets.append(ours)
        return ours

    def end(self, exit_code: int | None = 0, message: str = "") -> None:
        self.send(event="ended", exitCode=exit_code, message=message, job=JOB)
        self.connection.close()


class FakeDoor:
    """Listens where an executor would; `call()` is the next connection."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._calls: list[Call] = []
        self.listen()

    def listen(self) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE)
        Path(self.path).unlink(missing_ok=True)
        self.socket.bind(self.path)
        self.socket.listen()

    def call(self) -> tuple[Call, Any]:
        connection, _ = self.socket.accept()
        self._calls.append(Call(connection))
        return self._calls[-1], self._calls[-1].receive()

    def die(self) -> None:
        """As after `kill -9`: the socket's file stays, and nobody answers there."""
        self.socket.close()
        for call in self._calls:
            call.connection.close()

    def close(self) -> None:
        self.die()
        for call in self._calls:
            for each in call.sockets:
                each.close()


class Shell:
    """`beaker …` on a pseudo-terminal of its own, as a login shell would run it."""

    def __init__(
        self, environ: dict[str, str], *arguments: str, rows: int = 40, columns: int = 100, patch: str = "",
        **streams: Any,
    ) -> None:  # fmt: skip
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)
        self.seen = b""

        def own_terminal() -> None:
            os.setsid()
            ioctl(self.slave, termios.TIOCSCTTY, 0)

        streams = {"stdin": self.slave, "stdout": self.slave, "stderr": self.slave, **streams}
        command = [*PYTHON[:-1], PYTHON[-1].replace("; main()", f"; {patch or 'pass'}; main()"), *arguments]
        self.process = subprocess.Popen(command, env=environ, preexec_fn=own_terminal, **streams)

    def resize(self, rows: int, columns: int) -> None:
        ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, data: bytes) -> None:
        os.write(self.master, data)

    def expect(self, text: bytes) -> bytes:
        """Read until `text` was shown; returns everything up to it, which is then forgotten."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0], (text, self.seen)
            self.seen += os.read(self.master, 65536)
        before, _, self.seen = self.seen.partition(text)
        return before

    def is_raw(self) -> bool:
        return not termios.tcgetattr(self.slave)[3] & (termios.ICANON | termios.ECHO)

    def wait(self) -> int:
        """The exit code; the terminal must be as it was found."""
        code = self.process.wait(PATIENCE)
        assert termios.tcgetattr(self.slave) == self.before
        while select.select([self.master], [], [], 0)[0]:
            self.seen += os.read(self.master, 65536)
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "TERM": "xterm-test",
        "BEAKER_TOKEN": "secret",
        "BEAKER_SOCKET": str(tmp_path / "door"),
        "BEAKER_ADDR": "http://127.0.0.1:1",
    }


@pytest.fixture
def door(environ: dict[str, str]) -> Iterator[FakeDoor]:
    door = FakeDoor(environ["BEAKER_SOCKET"])
    yield door
    door.close()


@pytest.fixture
def shell(environ: dict[str, str]) -> Iterator[Callable[..., Shell]]:
    shells = []

    def start(*arguments: str, **options: Any) -> Shell:
        shells.append(Shell(environ, *arguments, **options))
        return shells[-1]

    yield start
    for each in shells:
        each.close()


@pytest.fixture
def pipe(environ: dict[str, str]) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    processes = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        processes.append(subprocess.Popen([*PYTHON, *arguments], env=environ, start_new_session=True, **streams))
        return processes[-1]

    yield start
    for each in processes:
        if each.poll() is None:
            each.kill()
        each.wait()
        for stream in (each.stdin, each.stdout, each.stderr):
            if stream and not stream.closed:
                stream.close()


def started(door: FakeDoor, shell: Shell) -> tuple[Call, socket.socket]:
    """A session at its prompt."""
    call, request = door.call()
    assert request["op"] == "create"
    call.send(event="created", job=JOB)
    session = call.terminal()
    assert call.receive() == {"resize": [40, 100]}
    session.send(b"$ ")
    shell.expect(b"$ ")
    assert shell.is_raw()
    return call, session


def read(session: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := session.recv(65536)):
        data += more
    return data


# -- the request and what is said


def test_create_sends_what_was_asked_and_shows_the_session(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell(
        "session", "create", "--gpus", "2", "-n", "demo", "-i", "debian:12", "--memory", "6.5GiB", "--env", "A=b=c"
    )
    call, request = door.call()
    assert (request["v"], request["op"], request["token"]) == (1, "create", "secret")
    assert (request["tty"], request["stdin"], request["detach"], request["size"]) == (True, True, False, [40, 100])
    assert len(request["key"]) == 32
    assert request["session"] == {
        "name": "demo",
        "requests": {"gpuCount": 2, "memory": "6.5GiB"},
        "image": {"docker": "debian:12"},
        "envVars": [{"name": "TERM", "value": "xterm-test"}, {"name": "A", "value": "b=c"}],
    }
    call.send(event="created", job=JOB)
    it.expect(b"Starting session " + ID.encode() + b" with at least 2 GPUs... (Press Ctrl+C to cancel)\r\n")
    call.send(event="queued", position=2, reason="needs 2 GPUs, 1 free", nodes=["gpu-3.lab"])
    it.expect(
        b"This session is unlikely to start soon because there are not enough available GPUs.\r\n"
        b"You may continue waiting to hold your place in the queue.\r\n"
    )
    it.expect(b"2 (needs 2 GPUs, 1 free)\r\n")
    it.expect(b"You could also try one of the following available nodes:\r\n    gpu-3.lab\r\n")
    call.send(event="pull", done=1 << 20, total=4 << 20, layers=[1, 4])
    it.expect(b"1MiB of 4MiB, 1 of 4 layers")
    call.send(event="reserved", gpus=["a=0", "a=1"], cpus=31.0, memory=2 << 30)
    it.expect(b"Reserved 2 GPUs, 31 CPUs, 2GiB of memory\r\n")
    session = call.terminal()
    session.send(b"hello\r\n")
    it.expect(b"hello\r\n")
    it.type(b"exit\r")
    assert read(session, 5) == b"exit\r"
    session.close()
    call.end(3)
    assert it.wait() == 3


def test_a_node_without_gpus_says_that_the_session_gets_none(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    call, _ = door.call()
    call.send(event="created", job={**JOB, "requests": {"gpuCount": 0}})
    it.expect(b"This node has no GPUs, so this session gets none.\r\nStarting session " + ID.encode() + b"... (Press")
    call.end(0)
    assert it.wait() == 0


def test_names_from_elsewhere_are_escaped(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    call.send(event="queued", position=1, reason="\x1b]0;owned\x07", nodes=["\u202enode"])
    call.end(1, "a\nb\x9b")
    assert it.wait() == 1
    assert b"\\x1b]0;owned\\x07" in it.seen
    assert b"\\u202enode" in it.seen
    assert b"a\\nb\\x9b" in it.seen
    assert b"\x1b]0" not in it.seen


@pytest.mark.parametrize(
    ("code", "message", "expected"),
    [(137, "out of memory", 137), (127, "", 127), (None, "given up by bob while waiting", 143)],
)
def test_the_end_is_told_and_becomes_the_exit_code(
    door: FakeDoor, shell: Callable[..., Shell], code: int | None, message: str, expected: int
) -> None:
    it = shell("session", "create")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    call.end(code, message)
    assert it.wait() == expected
    assert message.encode() in it.seen


def test_a_start_that_fails_is_the_commands_error(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    call.send(error={"code": 404, "error": "not_found", "message": "no image is called 'x'", "hint": "check its name"})
    assert it.wait() == 66
    assert b"beaker: no image is called 'x'; check its name\r\n" in it.seen


# -- the terminal


def test_the_window_size_follows_the_terminal(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    call, _ = started(door, it)
    it.resize(24, 132)
    assert call.receive() == {"resize": [24, 132]}


@pytest.mark.parametrize("keys", [[b"\x1ed"], [b"\x1e", b"d"], [b"ls\x1e", b"d"]], ids=["together", "apart", "after"])
def test_the_detach_key_leaves_the_session_running(
    door: FakeDoor, shell: Callable[..., Shell], keys: list[bytes]
) -> None:
    it = shell("session", "create")
    call, session = started(door, it)
    for key in keys:
        it.type(key)
        time.sleep(0.05)  # so that they are read apart, where they are sent apart
    assert it.wait() == 0
    assert f"beaker session attach {ID}".encode() in it.seen
    assert read(session, 100) == keys[0].rstrip(b"\x1ed")
    assert call.receive() is None


def test_the_first_key_twice_is_sent_once_and_others_pass(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    _, session = started(door, it)
    typed = b"\x1e\x1e" + b"\x1ex" + b"\x03\x04\x11\x13\x16\x1a\x1c\x7f\xff\r\n"
    it.type(typed)
    assert read(session, len(typed) - 1) == typed[1:]


def test_detaching_works_while_output_floods_a_stuck_terminal(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    _, session = started(door, it)
    session.settimeout(0.5)
    with pytest.raises(TimeoutError):  # nobody reads the terminal, so at some point nothing more is taken
        session.sendall(b"flood\r\n" * 1_000_000)
    it.type(b"\x1ed")
    deadline = time.monotonic() + PATIENCE
    while it.is_raw():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stuck_terminal_does_not_hold_up_the_session(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create", patch="import beaker_sessions.cli.follow as f; f.STUCK = 0.3")
    call, session = started(door, it)
    sent = b"flood\r\n" * 1_000_000
    session.sendall(sent)  # which nobody reads
    note = it.expect(b" bytes of output are not shown, as this terminal was stuck]\r\n")
    shown, _, skipped = note.rpartition(b"\x18\r\n[beaker: ")
    assert sent.startswith(shown)
    threading.Thread(target=session.sendall, args=[b"and on\r\n"]).start()  # it waits for what is read next
    rest = it.expect(b"and on\r\n")
    assert sent.endswith(rest)
    assert len(shown) + int(skipped) + len(rest) == len(sent)
    assert [call.receive(), call.receive()] == [{"resize": [41, 100]}, {"resize": [40, 100]}]  # for a repaint


def test_whoever_holds_up_others_says_that_it_reads_and_does(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create", patch="import beaker_sessions.cli.follow as f; f.PROMPT = 0.2")
    call, session = started(door, it)
    call.send(event="read_on")
    assert call.receive() == {"reading": True}
    session.settimeout(0.5)
    flood, asked = memoryview(b"flood\r\n" * 2_000_000), 0
    while flood:
        try:
            flood = flood[session.send(flood) :]
        except TimeoutError:  # nobody reads the terminal, so at some point nothing more is taken
            call.send(event="read_on")  # as the executor asks again and again
            while call.receive() != {"reading": True}:  # a size, when something was taken meanwhile
                pass
            asked += 1
    assert asked
    it.expect(b" bytes of output are not shown, as this terminal was stuck]\r\n")


def test_a_notice_is_told_in_the_terminal_and_the_screen_drawn_again(
    door: FakeDoor, shell: Callable[..., Shell]
) -> None:
    it = shell("session", "create")
    call, _ = started(door, it)
    call.send(event="notice", text="the disk is \x1b[31mfull")
    it.expect(b"\r\n[beaker: the disk is \\x1b[31mfull]\r\n")
    assert [call.receive(), call.receive()] == [{"resize": [41, 100]}, {"resize": [40, 100]}]


def test_detaching_works_while_the_executor_is_stuck(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    started(door, it)
    for number in range(800):  # more than the door's connection takes unread
        it.resize(20 + number % 2, 80)
        it.process.send_signal(signal.SIGWINCH)
        time.sleep(0.001)
    it.type(b"\x1ed")
    assert it.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT], ids=lambda n: n.name)
def test_signals_restore_the_terminal_and_leave_the_session(
    door: FakeDoor, shell: Callable[..., Shell], number: signal.Signals
) -> None:
    it = shell("session", "create")
    call, _ = started(door, it)
    it.process.send_signal(number)
    assert it.wait() == 128 + number
    assert call.receive() is None


def test_an_error_in_the_middle_restores_the_terminal(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    call, _ = started(door, it)
    call.send(error={"code": 401, "error": "unauthorized", "message": "this token was revoked", "hint": "get another"})
    assert it.wait() == 77
    assert b"beaker: this token was revoked; get another" in it.seen


def test_modes_that_a_killed_program_left_on_are_undone(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    call, session = started(door, it)
    session.send(b"\x1b[?1049h\x1b[?1006;1000h\x1b[?2004h\x1b[?25l and \x1b[?2004l")
    it.expect(b"\x1b[?2004l")
    session.close()
    call.end(137)
    assert it.wait() == 137
    for undone in (b"\x1b[?1049l", b"\x1b[?1000l", b"\x1b[?1006l", b"\x1b[?25h"):
        assert undone in it.seen
    assert b"2004" not in it.seen


def test_a_sequence_that_was_cut_off_takes_nothing_of_what_is_said_next(
    door: FakeDoor, shell: Callable[..., Shell]
) -> None:
    it = shell("session", "create")
    _, session = started(door, it)
    session.send(b"\x1b[38;5")
    it.expect(b"\x1b[38;5")
    it.type(b"\x1ed")
    assert it.wait() == 0
    assert it.seen.startswith(b"\x18")  # CAN of ECMA-48, which ends it


def test_attach_shows_what_was_said_before(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "attach")
    call, request = door.call()
    assert (request["op"], request["id"]) == ("get", None)
    call.send(job=JOB)
    call, request = door.call()
    assert (request["op"], request["id"], request["replay"], request["stream"]) == ("attach", ID, True, True)
    session = call.terminal(replay=base64.b64encode(b"earlier\r\n").decode())
    session.send(b"now")
    assert it.expect(b"now").endswith(b"earlier\r\n")
    session.close()
    call.end(0)
    assert it.wait() == 0


def test_exec_opens_a_terminal_and_returns_its_exit_code(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "exec", "demo", "ls", "-l", "--all")
    call, request = door.call()
    assert (request["op"], request["id"], request["command"]) == ("exec", "demo", ["ls", "-l", "--all"])
    assert (request["size"], request["env"]) == ([40, 100], [{"name": "TERM", "value": "xterm-test"}])
    session = call.terminal(handle="h1")
    session.send(b"total 0\r\n")
    it.expect(b"total 0\r\n")
    session.close()
    call.end(5)
    assert it.wait() == 5


# -- waiting and cancelling


@pytest.mark.parametrize("pulling", [False, True])
def test_control_c_gives_the_place_up_and_says_so(door: FakeDoor, shell: Callable[..., Shell], pulling: bool) -> None:
    it = shell("session", "create")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    call.send(event="queued", position=1, reason="", nodes=[])
    it.expect(b"Place in the queue: 1")
    it.type(b"\x03")
    assert call.receive() == {"cancel": True}
    if pulling:
        call.send(error={"code": 409, "error": "conflict", "message": "stopped by ada", "hint": ""})
    else:
        call.end(None, "given up")
    assert it.wait() == 130
    assert b"has given up its place" in it.seen


def test_an_interruption_before_the_session_exists_cancels_it_when_it_does(
    door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]
) -> None:
    it = pipe("session", "create")
    call, _ = door.call()
    it.send_signal(signal.SIGINT)
    assert call.receive() == {"cancel": True}  # the executor ignores what it cannot do yet
    call.send(event="created", job=JOB)
    assert call.receive() == {"cancel": True}
    call.end(None)
    assert it.wait(PATIENCE) == 130


# -- an executor that goes away


def test_a_killed_executor_does_not_interrupt_the_terminal(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    call, session = started(door, it)
    door.die()
    session.send(b"still here")
    it.expect(b"still here")
    it.type(b"typed")
    assert read(session, 5) == b"typed"
    door.listen()
    call, request = door.call()
    assert (request["op"], request["id"], request["stream"]) == ("attach", ID, False)
    it.resize(30, 90)
    while call.receive() != {"resize": [30, 90]}:
        pass
    session.close()
    call.end(7)
    assert it.wait() == 7


def test_an_end_while_the_executor_is_away_is_learned_later(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "exec", "--session", "demo", "--", "make")
    call, _ = door.call()
    session = call.terminal(handle="h1")
    door.die()
    session.close()
    door.listen()
    call, request = door.call()
    assert (request["op"], request["id"], request["handle"]) == ("exec_exit", "demo", "h1")
    call.send(event="ended", exitCode=9, message="")
    assert it.wait() == 9


@pytest.mark.parametrize("runs", [False, True])
def test_all_output_since_the_start_comes_late_when_the_executor_was_away(
    door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]], runs: bool
) -> None:
    it = pipe("session", "create", "--", "make")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    door.die()
    door.listen()
    call, request = door.call()
    assert (request["op"], request["id"], request["stream"], request["whole"]) == ("attach", ID, True, True)
    output = b"made\n" * 200_000  # more than a frame holds
    with os.fdopen(os.memfd_create("output"), "wb", buffering=0) as file:
        file.write(framed(1, output) + framed(2, b"warned\n"))
        file.seek(0)
        call.send(file.fileno(), event="earlier", framing="multiplexed")
    if runs:
        session = call.terminal()
        session.send(b"and on\n")
        session.close()
    call.end(3)
    out, error = it.communicate(timeout=PATIENCE)
    assert out == output + b"and on\n" * runs
    assert error.endswith(b"\nwarned\n")
    assert it.returncode == 3


def test_a_create_that_was_not_acknowledged_is_sent_again_with_its_key(
    door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]
) -> None:
    it = pipe("session", "create", "--", "true")
    call, first = door.call()
    call.connection.close()
    call, second = door.call()
    assert second == first
    call.send(event="created", job=JOB)
    call.end(0)
    assert it.wait(PATIENCE) == 0


@pytest.mark.parametrize("there", [True, False])
def test_a_create_while_the_executor_is_restarted_waits_for_it(
    door: FakeDoor, shell: Callable[..., Shell], there: bool
) -> None:
    door.die()
    if not there:  # the moment before it binds
        Path(door.path).unlink()
    create = shell("session", "create")
    if there:
        create.expect(b"The executor is not there; waiting for it to come back.")
    door.listen()
    call, _ = door.call()
    call.send(event="created", job=JOB)
    call.end(3)
    assert create.wait() == 3


def test_a_queued_session_keeps_waiting_for_a_restarted_executor(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    call.send(event="queued", position=1, reason="", nodes=[])
    it.expect(b"queue: 1")
    call.connection.close()
    call, request = door.call()
    assert (request["op"], request["id"], request["stream"], request["replay"]) == ("attach", ID, True, True)
    session = call.terminal()
    session.send(b"$ ")
    it.expect(b"$ ")
    session.close()
    call.end(0)
    assert it.wait() == 0


def test_what_another_executor_repeats_is_said_once(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "create")
    reserved: dict[str, Any] = {"event": "reserved", "gpus": ["a=0"], "cpus": 4.0, "memory": 0, "ports": {"80": 20000}}
    call, _ = door.call()
    call.send(event="created", job=JOB)
    call.send(**reserved)
    it.expect(b"Reserved 1 GPU, 4 CPUs\r\nExposed Ports: 0.0.0.0:20000->80/tcp\r\n")
    call.connection.close()
    call, _ = door.call()
    call.send(**reserved)
    call.end(0)
    assert it.wait() == 0
    assert b"Reserved" not in it.seen
    assert b"Exposed" not in it.seen


def test_an_exec_whose_start_is_uncertain_says_that_it_may_have_run(
    door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]
) -> None:
    it = pipe("session", "exec", "demo", "--", "make")
    call, _ = door.call()
    call.connection.close()
    _, errors = it.communicate(timeout=PATIENCE)
    assert it.returncode == 69
    assert b"before it said whether the command was started: it may have run" in errors
    assert b"beaker session exec demo -- ps" in errors


def test_leaving_an_exec_whose_start_is_uncertain_says_so_too(door: FakeDoor, shell: Callable[..., Shell]) -> None:
    it = shell("session", "exec", "demo", "--", "make")
    door.call()
    it.process.send_signal(signal.SIGINT)
    assert it.wait() == 130
    assert b"it may have run" in it.seen


def test_a_resumed_create_is_still_for_whom_root_asked(
    door: FakeDoor, environ: dict[str, str], pipe: Callable[..., subprocess.Popen[bytes]]
) -> None:
    environ["SUDO_USER"] = "nobody"
    it = pipe("session", "create", "--", "true")
    call, first = door.call()
    call.send(event="created", job=JOB)
    call.connection.close()
    call, second = door.call()
    assert (second["op"], second.get("user")) == ("attach", first.get("user"))
    call.end(0)
    assert it.wait(PATIENCE) == 0


# -- without a terminal


def test_pipes_carry_every_byte_both_ways(door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]) -> None:
    it = pipe("session", "create", "--", "cat")
    call, request = door.call()
    assert (request["tty"], request["size"], request["session"]["command"]) == (False, None, ["cat"])
    assert "envVars" not in request["session"]
    call.send(event="created", job=JOB)
    session = call.terminal("multiplexed")
    data = bytes(range(256)) * 8192  # 2 MiB, so that every buffer on the way is filled

    def copy() -> None:
        while received := session.recv(50_001):
            session.sendall(struct.pack(">BxxxL", 1, len(received)) + received)
        session.sendall(struct.pack(">BxxxL", 2, 4) + b"done")
        session.close()
        call.end(0)

    copying = threading.Thread(target=copy)
    copying.start()
    out, errors = it.communicate(data, PATIENCE)
    copying.join()
    assert it.returncode == 0
    assert out == data
    assert errors.endswith(b"done")


def test_conmon_packets_are_told_apart(door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]) -> None:
    it = pipe("session", "create", "-q", "--", "x")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    session = call.terminal("conmon")
    session.send(b"\x02out")
    session.send(b"\x03err")
    session.close()
    call.end(0)
    assert it.communicate(timeout=PATIENCE) == (b"out", b"err")


def test_signals_go_to_the_session(door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]) -> None:
    it = pipe("session", "create", "--", "x")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    session = call.terminal("multiplexed")
    session.sendall(struct.pack(">BxxxL", 1, 2) + b"up")
    assert it.stdout
    assert it.stdout.read(2) == b"up"
    for number in (signal.SIGINT, signal.SIGTERM):
        it.send_signal(number)
        assert call.receive() == {"signal": number}
    session.close()
    call.end(143)
    assert it.wait(PATIENCE) == 143


def test_a_reader_that_leaves_ends_quietly(door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]) -> None:
    it = pipe("session", "create", "-q", "--", "yes")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    session = call.terminal("multiplexed")
    session.sendall(struct.pack(">BxxxL", 1, 2) + b"y\n")
    assert it.stdout
    assert it.stderr
    assert it.stdout.read(2) == b"y\n"
    it.stdout.close()
    session.sendall(struct.pack(">BxxxL", 1, 2) + b"y\n")
    assert call.receive() == {"signal": signal.SIGPIPE}
    session.close()
    call.end(141)
    assert it.wait(PATIENCE) == 141
    assert it.stderr.read() == b""


def test_errors_that_nobody_reads_do_not_stop_the_output(
    door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]
) -> None:
    it = pipe("session", "create", "-q", "--", "x")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    session = call.terminal("multiplexed")
    assert it.stdout
    assert it.stderr
    it.stderr.close()
    session.sendall(struct.pack(">BxxxL", 2, 3) + b"err" + struct.pack(">BxxxL", 1, 3) + b"out")
    session.close()
    call.end(4)
    assert it.stdout.read() == b"out"
    assert it.wait(PATIENCE) == 4


def test_a_slow_reader_gets_everything_after_the_end(
    door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]
) -> None:
    it = pipe("session", "create", "-q", "--", "x")
    call, _ = door.call()
    call.send(event="created", job=JOB)
    session = call.terminal("multiplexed")
    data = b"x" * 150_000
    session.sendall(struct.pack(">BxxxL", 1, len(data)) + data)
    session.close()
    call.end(0)
    assert it.stdin
    it.stdin.close()
    time.sleep(2.5)  # longer than the stream may be silent after the end
    assert it.stdout
    assert it.stdout.read() == data
    assert it.wait(PATIENCE) == 0


def test_detached_prints_the_id(door: FakeDoor, pipe: Callable[..., subprocess.Popen[bytes]]) -> None:
    it = pipe("session", "create", "--detach", "-q", "--", "train")
    call, request = door.call()
    assert (request["detach"], request["tty"], request["stdin"]) == (True, False, False)
    call.send(event="created", job=JOB)
    call.connection.close()  # it is not known whether it could start
    call, request = door.call()
    assert (request["op"], request["id"], request["detach"]) == ("attach", ID, True)
    call.send(event="detached")
    out, errors = it.communicate(timeout=PATIENCE)
    assert (it.returncode, out, errors) == (0, ID.encode() + b"\n", b"")


# -- logging in


def test_login_asks_without_echo_until_the_token_is_right(
    door: FakeDoor, shell: Callable[..., Shell], environ: dict[str, str], tmp_path: Path
) -> None:
    del environ["BEAKER_TOKEN"]
    it = shell("session", "create")
    door.call()  # whether an executor answers at all
    it.expect(b"http://127.0.0.1:1/user")
    it.expect(b"Token: ")
    it.type(b"wrong\n")
    call, request = door.call()
    assert (request["op"], request["token"]) == ("list", "wrong")
    call.send(error={"code": 401, "error": "unauthorized", "message": "no account has this token", "hint": ""})
    it.expect(b"no account has this token. Try again")
    it.expect(b"Token: ")
    it.type(b"right\n")
    call, _ = door.call()
    call.send(end=True)
    call, request = door.call()
    assert (request["op"], request["token"]) == ("create", "right")
    call.end(0)
    assert it.wait() == 0
    file = tmp_path / ".beaker/config.yml"
    assert file.read_text() == "user_token: right\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"right\r" not in it.seen
    assert b"wrong" not in it.seen


def test_leaving_the_question_for_the_token_restores_the_echo(
    door: FakeDoor, shell: Callable[..., Shell], environ: dict[str, str]
) -> None:
    del environ["BEAKER_TOKEN"]
    it = shell("session", "create")
    door.call()
    it.expect(b"Token: ")
    it.process.send_signal(signal.SIGTERM)
    assert it.wait() == 130
