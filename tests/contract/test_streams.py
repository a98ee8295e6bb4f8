"""Drivers that run processes: bytes, terminals, detaching and coming back."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.model import Identity
from beaker_sessions.sandbox import Status
from beaker_sessions.sandbox.docker.replay import frames

from .conftest import ADA, Maker, OciLab

EVERY_BYTE = bytes(range(256))


def test_every_byte_passes_unchanged_both_ways(make: Maker) -> None:
    stream = make.start(make.spec("cat"))
    sent = EVERY_BYTE * 1000
    stream.write(sent[:100_000])
    stream.read(sent[:100_000][-1000:])
    stream.write(sent[100_000:])
    with socket.socket(fileno=os.dup(stream.terminal.fd)) as other:
        other.shutdown(socket.SHUT_WR)
    assert stream.read() == sent
    assert stream.err == b""


def test_half_close_ends_the_input_only(make: Maker) -> None:
    spec = make.spec("sh", "-c", "wc -c; echo late")
    stream = make.start(spec)
    stream.write(b"12345")
    with socket.socket(fileno=os.dup(stream.terminal.fd)) as other:
        other.shutdown(socket.SHUT_WR)
    assert stream.read() == b"5\nlate\n"
    assert make.exit_code(spec.id) == 0


def test_output_and_errors_are_told_apart(make: Maker) -> None:
    code, out, err = make.run("sh", "-c", r"printf 'out\0\377'; printf 'err\n' >&2; exit 3")
    assert (code, out, err) == (3, b"out\0\xff", b"err\n")


def test_streams_can_be_opened_by_their_names(make: Maker) -> None:
    script = "read line </dev/stdin; echo $line >/dev/stdout; echo err >/dev/stderr; id -u >/dev/stdout"
    stream = make.start(make.spec("sh", "-c", script))
    stream.write(b"in\n")
    assert (stream.read(), stream.err) == (b"in\n1500\n", b"err\n")
    identities = [ADA, Identity("root", 0, 0, "/root", {0: "root"})] if make.lab.sandboxes.root else [ADA]
    spec = make.spec("sleep", "1000")
    make.start(spec)
    for identity in identities:
        _, terminal = make.lab.sandboxes.exec(
            spec.id, ("sh", "-c", script), env={}, identity=identity, workdir="/", size=None, stdin=True
        )
        stream = make.stream(terminal)
        stream.write(b"in\n")
        assert (stream.read(), stream.err) == (f"in\n{identity.uid}\n".encode(), b"err\n")


def test_no_input_is_an_empty_input(make: Maker) -> None:
    assert make.run("wc", "-c") == (0, b"0\n", b"")


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 255", 255), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_exit_code(make: Maker, script: str, code: int) -> None:
    assert make.run("sh", "-c", script)[0] == code


@pytest.mark.parametrize(
    ("command", "code"),
    [("no-such-command", 127), ("/no/such", 127), ("/etc/not-a-program", 126), ("/etc", 126), ("", 127)],
)
def test_what_cannot_be_run(make: Maker, command: str, code: int) -> None:
    result, out, err = make.run(command, image="debian" if command != "/etc/not-a-program" else "alpine")
    assert (result, out) == (code, b"")
    assert err.startswith(b"beaker: " + command.encode())
    assert err.count(b"\n") == 1


def test_the_image_s_own_program_runs_and_not_busybox_s(make: Maker) -> None:
    code, out, _ = make.run("ls", "--version", image="debian")
    assert (code, b"GNU coreutils" in out) == (0, True)


def test_best_shell(make: Maker) -> None:
    for image, shell in (("debian", b"/bin/bash"), ("alpine", b"/bin/sh"), ("scratch", b"/.beaker/busybox")):
        stream = make.start(make.spec(image=image, tty=True))
        stream.write(b"echo shell=$SHELL; exit 4\n")
        assert b"shell=" + shell + b"\r\n" in stream.read()


def test_window_size_is_right_in_the_first_thing_run(make: Maker) -> None:
    for n in range(20):
        stream = make.start(make.spec("stty", "size", image="debian", tty=True), (30 + n, 100 + n))
        assert stream.read() == b"%d %d\r\n" % (30 + n, 100 + n)


def test_window_size_is_right_in_the_first_thing_an_exec_runs(make: Maker) -> None:
    spec = make.spec("cat", image="debian")
    make.start(spec)
    for n in range(20):
        handle, terminal = make.lab.sandboxes.exec(
            spec.id, ("stty", "size"), env={}, identity=ADA, workdir="/", size=(30 + n, 100 + n), stdin=True
        )
        assert make.stream(terminal).read() == b"%d %d\r\n" % (30 + n, 100 + n)
        assert make.lab.sandboxes.exec_exit(spec.id, handle) == 0


def test_resize(make: Maker) -> None:
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    spec = make.spec("bash", "-c", script, image="debian", tty=True)
    stream = make.start(spec)
    handle, terminal = make.lab.sandboxes.exec(
        spec.id, ("bash", "-c", script), env={}, identity=ADA, workdir="/", size=(24, 80), stdin=True
    )
    other = make.stream(terminal)
    for each in (stream, other):
        each.read(b"ready")
    make.lab.sandboxes.resize(spec.id, (41, 141))
    make.lab.sandboxes.resize(spec.id, (42, 142), handle)
    stream.read(b"41 141\r\n")
    other.read(b"42 142\r\n")


def test_the_last_of_many_sizes_holds(make: Maker) -> None:
    """Also when they come faster than they are taken."""
    spec = make.spec("sh", "-c", "read x; stty size", image="debian", tty=True)
    stream = make.start(spec)
    if isinstance(make.lab, OciLab):
        ((_, sandbox),) = make.lab.sandboxes._sandboxes()
        sandbox.conmon.kill(signal.SIGSTOP)
        threading.Timer(1.5, sandbox.conmon.kill, [signal.SIGCONT]).start()
    for columns in (91, 90):
        make.lab.sandboxes.resize(spec.id, (30, columns))
    time.sleep(0.3)
    stream.write(b"\n")
    stream.read(b"30 90\r\n")


def test_every_key_goes_to_the_program_at_once(make: Maker) -> None:
    """Docker's own detach keys start with Ctrl-P, which Bash needs."""
    script = "import os\nfor key in [b'ready', *[0] * 3]: print(key or os.read(0, 1), flush=True)"
    stream = make.start(make.spec("sh", "-c", f'stty raw -echo; python3 -c "{script}"', image="debian", tty=True))
    stream.read(b"ready")
    for key, seen in ((b"\x10", b"b'\\x10'"), (b"\x11", b"b'\\x11'"), (b"\x00", b"b'\\x00'")):
        stream.write(key)
        stream.read(seen)


@pytest.mark.parametrize("tty", [True, False])
def test_coming_back_shows_what_was_missed_once(make: Maker, tty: bool) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i + 1)); [ $((i % 10)) = 0 ] && usleep 5000; done"
    spec = make.spec("sh", "-c", script, tty=tty, stdin=tty)
    stream = make.start(spec)
    for mark in (b"line 400\r\n", b"line 900\r\n", b"line 1500\r\n"):
        stream.read(mark if tty else mark.replace(b"\r", b""))
        stream.close()
        terminal = make.lab.sandboxes.attach(spec.id, replay=True)
        stream = make.stream(terminal)
        stream.data[1] = terminal.replay
    numbers = [int(number) for number in re.findall(rb"line (\d+)\r?\n", stream.read())]
    assert numbers[0] <= 1500
    assert numbers == list(range(numbers[0], 3000))


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("tty", [True, False])
def test_all_output_can_be_had_by_who_comes_late(make: Maker, tty: bool, ended: bool) -> None:
    script = f"seq 1 40000; seq 1 9 >&2; echo done; {'true' if ended else 'sleep 1; echo on'}"
    spec = make.spec("sh", "-c", script, tty=tty)
    stream = make.start(spec)
    stream.read(b"done\r\n" if tty else b"done\n")
    stream.close()
    if ended:
        make.exit_code(spec.id)
    terminal = make.lab.sandboxes.attach(spec.id, replay=True, whole=True)
    live = make.stream(terminal).read()
    whole = b"".join(b"%d\n" % n for n in range(1, 40001))
    errors = b"".join(b"%d\n" % n for n in range(1, 10))
    last = b"done\n" if ended else b"done\non\n"
    if tty:
        assert (terminal.replay + live).replace(b"\r\n", b"\n") == whole + errors + last
    else:
        said = {1: b"", 2: b""}
        for kind, data in frames(terminal.replay)[0]:
            said[kind] += data
        assert (said[1] + live, said[2]) == (whole + last, errors)


def test_coming_back_shows_at_least_the_last_64_kib(make: Maker) -> None:
    spec = make.spec("sh", "-c", "seq 1 30000; echo ready; cat", tty=True)
    stream = make.start(spec)
    stream.read(b"ready")
    stream.close()
    replay = make.lab.sandboxes.attach(spec.id, replay=True).replay
    lines = replay.splitlines()
    assert len(replay) > 65000
    assert lines[-1] == b"ready"
    assert lines[:-1] == [b"%d" % n for n in range(int(lines[0]), 30001)]


def test_logs_are_the_last_bytes(make: Maker) -> None:
    spec = make.spec("sh", "-c", "seq 1 2000; printf end", stdin=False)
    make.start(spec).read()
    make.wait(spec.id, Status.EXITED)
    whole = b"".join(b"%d\n" % n for n in range(1, 2001)) + b"end"
    assert make.lab.sandboxes.logs(spec.id, 1 << 20) == whole
    assert make.lab.sandboxes.logs(spec.id, 100) == whole[-100:]


def test_exec_is_who_and_where_it_should_be(make: Maker) -> None:
    spec = make.spec("cat")
    make.start(spec)
    handle, terminal = make.lab.sandboxes.exec(
        spec.id, ("sh", "-c", "id; pwd; echo $FRUIT; cat; exit 9"), env={"FRUIT": "pear"}, identity=ADA, workdir="/etc",
        size=None, stdin=True,
    )  # fmt: skip
    stream = make.stream(terminal)
    stream.write(EVERY_BYTE)
    with socket.socket(fileno=os.dup(stream.terminal.fd)) as other:
        other.shutdown(socket.SHUT_WR)
    known, _, rest = stream.read().partition(b"\n")
    assert known == b"uid=1500(ada) gid=1500(ada) groups=27(sudo),1500(ada),4711(project)"
    assert rest == b"/etc\npear\n" + EVERY_BYTE
    assert make.lab.sandboxes.exec_exit(spec.id, handle) == 9


HOSTILE = "".join(map(chr, range(1, 0x180))) + "\U0001f600\u202e$(touch /tmp/x)`id`'\"\\\n-"


def test_arguments_and_variables_of_any_text(make: Maker) -> None:
    script = "import os, sys; sys.stdout.buffer.write(os.fsencode(sys.argv[1]) + b'|' + os.environb[b'HOSTILE'])"
    code, out, _ = make.run("python3", "-c", script, HOSTILE, image="debian", env={"HOSTILE": HOSTILE})
    assert (code, out) == (0, HOSTILE.encode() + b"|" + HOSTILE.encode())


def test_what_cannot_be_an_argument_is_refused(make: Maker) -> None:
    for text in ("\udcff", "a\0b"):
        with pytest.raises(Error) as error:
            make.lab.sandboxes.create(make.spec("echo", text))
        assert error.value.code == "invalid"
