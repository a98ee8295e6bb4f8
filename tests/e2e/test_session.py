"""What a researcher does all day: commands, terminals, coming back, second terminals."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

from tests.e2e.conftest import PROMPT, Tty
from tests.recorder import Recorder
from tests.stack import Stack, User, wait_for

DETACH = "\x1ed"


def test_a_command_prints_and_ends(ada: User):
    done = ada.beaker("session", "create", "--gpus", "0", "--", "python3", "--version")
    assert (done.returncode, done.stdout[:7]) == (0, b"Python "), done.stderr


def test_output_and_errors_are_kept_apart_byte_for_byte(ada: User):
    code = "import sys; sys.stdout.buffer.write(bytes(range(256)) * 300); sys.stderr.write('oops')"
    done = ada.beaker("session", "create", "--gpus", "0", "--quiet", "--", "python3", "-c", code)
    assert done.stdout == bytes(range(256)) * 300
    assert done.stderr.endswith(b"oops")


def test_standard_input_is_piped_to_its_end(ada: User):
    sent = os.urandom(3_000_000)
    done = ada.beaker("session", "create", "--gpus", "0", "--", "cat", input=sent)
    assert (done.returncode, done.stdout) == (0, sent)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["false"], 1),
        (["bash", "-c", "exit 42"], 42),
        (["bash", "-c", "kill -KILL $$"], 137),
        (["bash", "-c", "kill -TERM $$"], 143),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_the_exit_code_is_the_commands(ada: User, command: list[str], code: int, recorder: Recorder):
    recorder.excuse("I4")  # whoever kills themselves look like the killed
    assert ada.beaker("session", "create", "--gpus", "0", "--", *command).returncode == code


def test_one_is_oneself_at_home(ada: User):
    script = "id -un; id -u; id -Gn; pwd; echo $HOME; touch new; stat -c %U new"
    done = ada.beaker("session", "create", "--gpus", "0", "--", "bash", "-c", script)
    name, uid, groups, cwd, home, owner = done.stdout.decode().splitlines()
    assert (name, uid, owner) == (ada.name, str(ada.uid), ada.name)
    assert cwd == home == str(ada.home)
    assert set(groups.split()) == {ada.name, "video", "games"}
    assert (ada.home / "new").stat().st_uid == ada.uid


def test_all_but_home_is_gone_afterwards(ada: User):
    assert ada.beaker("session", "create", "--gpus", "0", "--", "touch", "/tmp/mark").returncode == 0
    assert ada.beaker("session", "create", "--gpus", "0", "--", "test", "-e", "/tmp/mark").returncode == 1


def test_bash_in_a_terminal_with_the_right_size(ada: User, tty: type[Tty]):
    terminal = tty(ada, "session", "create", "--gpus", "0")
    assert terminal.run("stty size; whoami") == f"33 111\n{ada.name}\n"
    terminal.setwinsize(40, 90)
    wait_for("the new size", lambda: terminal.run("stty size") == "40 90\n")
    terminal.expect(PROMPT)
    terminal.sendline("exit 7")
    assert terminal.end() == 7


def test_the_first_program_sees_the_size(ada: User, tty: type[Tty]):
    for _ in range(5):
        terminal = tty(ada, "session", "create", "--gpus", "0", "--", "stty", "size")
        terminal.expect("33 111")
        assert terminal.end() == 0


def test_detach_attach_exec_stop(ada: User, tty: type[Tty]):
    first = tty(ada, "session", "create", "--gpus", "0", "--name", "work")
    assert first.run("mark=still-here; echo ready-$((40+2))") == "ready-42\n"
    first.expect(PROMPT)
    first.send(DETACH)
    assert first.end() == 0

    (job,) = ada.json("session", "list")
    assert (job["name"], job["status"].get("exited")) == ("work", None)

    second = tty(ada, "session", "attach", "work")
    second.expect("ready-42")  # its recent output
    assert second.run("echo $mark") == "still-here\n"

    done = ada.beaker("session", "exec", "--", "sh", "-c", "echo second; exit 3")
    assert (done.returncode, done.stdout) == (3, b"second\n"), done.stderr
    other = tty(ada, "session", "exec", job["id"])
    assert other.run("stty size") == "33 111\n"
    other.expect(PROMPT)
    other.sendline("exit 5")
    assert other.end() == 5

    assert ada.beaker("session", "stop", "work").returncode == 0
    assert second.end() != 0
    assert ada.json("session", "list") == []


def test_killing_the_command_line_ends_nothing(ada: User, tty: type[Tty]):
    first = tty(ada, "session", "create", "--gpus", "0")
    assert first.run("echo here") == "here\n"
    first.kill(signal.SIGKILL)
    first.close()
    again = tty(ada, "session", "attach")
    assert again.run("echo again") == "again\n"
    again.expect(PROMPT)
    again.sendline("exit")
    assert again.end() == 0


def test_hanging_up_detaches(ada: User, tty: type[Tty]):
    first = tty(ada, "session", "create", "--gpus", "0")
    first.run("true")
    first.close(force=True)  # as when SSH is dropped: the terminal is gone
    time.sleep(0.3)
    assert len(ada.json("session", "list")) == 1


def test_a_terminal_that_does_not_read_holds_nobody_up(ada: User, tty: type[Tty]):
    frozen = tty(ada, "session", "create", "--gpus", "0", "--name", "frozen")
    frozen.expect(PROMPT)
    frozen.sendline("seq 1 1000000; touch ~/flooded")
    frozen.expect_exact("1000\r\n")
    frozen.kill(signal.SIGSTOP)  # as a machine that was suspended
    fresh = tty(ada, "session", "attach", "frozen")
    fresh.expect_exact("1000000\r\n")
    fresh.run("true")
    assert (ada.home / "flooded").exists()
    frozen.kill(signal.SIGCONT)
    frozen.expect("took no output, and the session did not wait for it")
    assert frozen.end() == 73
    fresh.sendline("exit")
    assert fresh.end() == 0


def test_the_image_cannot_choose_the_gpus(ada: User):
    command = [
        "session",
        "create",
        "--gpus",
        "0",
        "--env",
        "NVIDIA_VISIBLE_DEVICES=all",
        "--env",
        "CUDA_VISIBLE_DEVICES=0",
    ]
    done = ada.beaker(*command, "--", "env")
    seen = dict(line.split("=", 1) for line in done.stdout.decode().splitlines())
    assert seen["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "CUDA_VISIBLE_DEVICES" not in seen
    assert seen["BEAKER_ASSIGNED_GPU_COUNT"] == "0"


def test_detached_logs_and_describe(ada: User):
    done = ada.beaker("session", "create", "--gpus", "0", "--detach", "--", "sh", "-c", "echo hello; sleep 1; exit 4")
    id = done.stdout.decode().strip()
    assert re.fullmatch("[0-9A-Z]{26}", id), done.stderr
    wait_for("its output", lambda: ada.beaker("session", "logs", id).stdout == b"hello\n")
    wait_for("its end", lambda: ada.json("session", "get", id)[0]["status"].get("exitCode") == 4)
    wait_for("the output at the server", lambda: ada.beaker("session", "logs", id).stdout == b"hello\n")


def test_others_see_that_it_runs_but_not_what(ada: User, bob: User):
    id = ada.beaker("session", "create", "--gpus", "0", "--detach", "--", "sleep", "1000").stdout.decode().strip()
    (job,) = [job for job in bob.json("session", "list", "--all") if job["id"] == id]
    assert job["author"]["name"] == ada.name
    assert "sleep" not in str(job)
    for command in ("attach", "exec", "stop", "logs"):
        done = bob.beaker("session", command, id)
        assert done.returncode == 77, (command, done.stderr)
    assert len(ada.json("session", "list")) == 1


def test_a_container_is_found_by_its_labels(stack: Stack, ada: User):
    if stack.driver != "docker":
        pytest.skip("labels of Docker Engine")
    id = ada.beaker("session", "create", "--gpus", "0", "--detach", "--", "sleep", "1000").stdout.decode().strip()
    found = stack.docker_cli("ps", "-q", "--filter", f"label=beaker.session={id}").stdout.split()
    assert len(found) == 1
