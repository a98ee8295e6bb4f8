"""What dies, and what goes on: executor, server, ledger, Docker Engine's events."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from beaker_sessions.client import Client
from tests.e2e.conftest import PROMPT, Tty
from tests.recorder import Recorder
from tests.stack import BIN, Stack, User, wait_for


@pytest.fixture(autouse=True)
def everything_runs(stack: Stack):
    yield
    for process in (stack.docker, stack.server, stack.executor):
        if process.popen.poll() is not None:
            process.start()
    wait_for("server and executor", stack.answers)


def detached(user: User, *words: str) -> str:
    done = user.beaker("session", "create", "--detach", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().strip()


@pytest.fixture
def go(bob: User) -> Iterator[Path]:
    """A file for which a session of bob's waits, to end at the right moment however slow the machine is."""
    path = bob.home / "go"
    yield path
    path.unlink(missing_ok=True)


WAIT = "until [ -e ~/go ]; do sleep 0.05; done; "


def test_killing_the_executor_ends_no_session(stack: Stack, ada: User, bob: User, tty: type[Tty], go: Path):
    terminal = tty(ada, "session", "create", "--gpus", "1", "--name", "shell")
    terminal.run("mark=kept")
    long = detached(bob, "--gpus", "1", "--name", "long", "--", "sleep", "1000")
    short = detached(bob, "--gpus", "0", "--", "sh", "-c", WAIT + "exit 9")
    waiting = [detached(bob, "--gpus", "1", "--", "true") for _ in range(2)]
    wait_for("three sandboxes", lambda: len(stack.sandboxes()) == 3)
    before = stack.sandboxes()

    stack.executor.kill(signal.SIGKILL)
    assert terminal.run("echo $mark") == "kept\n"  # an open terminal does not even notice
    go.touch()
    wait_for("the short one's end", lambda: not Path(f"/proc/{before[short]}").exists())
    stack.start_executor()

    assert {id: pid for id, pid in stack.sandboxes().items() if id != short} == {
        id: pid for id, pid in before.items() if id != short
    }
    wait_for("its exit code", lambda: bob.json("session", "get", short)[0]["status"].get("exitCode") == 9)
    jobs = {job["id"]: job for job in bob.json("session", "list")}
    assert [jobs[id]["queuePosition"] for id in waiting] == [1, 2]
    held = {gpu for job in ada.json("session", "list", "--all") for gpu in job.get("limits", {}).get("gpus", [])}
    assert held == {"example.com/gpu=0", "example.com/gpu=1"}

    terminal.setwinsize(20, 70)
    wait_for("a resize through the new executor", lambda: terminal.run("stty size") == "20 70\n")
    terminal.expect(PROMPT)
    terminal.sendline("exit 6")
    assert terminal.end() == 6
    assert bob.beaker("session", "stop", long).returncode == 0
    wait_for("the queue to empty", lambda: bob.json("session", "list") == [])


def test_output_of_a_session_that_nobody_was_there_to_pass_on_is_not_lost(stack: Stack, ada: User, bob: User, go: Path):
    """It starts and ends between the start of an executor and the moment its command line has found that."""
    first = detached(bob, "--gpus", "2", "--", "sh", "-c", WAIT)
    wait_for("it runs", lambda: stack.sandboxes().get(first))
    script = "seq 1 100000; seq 1 9 >&2; exit 7"
    command = [BIN / "beaker", "session", "create", "--gpus", "1", "--", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **ada.process()) as create:
        wait_for("its place in the queue", lambda: ada.json("session", "list"))
        stack.executor.kill(signal.SIGKILL)
        create.send_signal(signal.SIGSTOP)
        go.touch()
        stack.start_executor()
        wait_for("its end", lambda: ada.json("session", "list") == [])
        create.send_signal(signal.SIGCONT)
        out, error = create.communicate(timeout=60)
    assert out == b"".join(b"%d\n" % n for n in range(1, 100001))
    assert error.endswith(b"".join(b"%d\n" % n for n in range(1, 10)))
    assert create.returncode == 7


def test_an_exec_survives_the_executor_too(stack: Stack, ada: User, tty: type[Tty]):
    detached(ada, "--gpus", "0", "--", "sleep", "1000")
    wait_for("it runs", lambda: len(stack.sandboxes()) == 1)
    second = tty(ada, "session", "exec")
    second.run("true")
    stack.executor.kill(signal.SIGKILL)
    assert second.run("echo here") == "here\n"
    stack.start_executor()
    second.setwinsize(20, 70)
    wait_for("a resize through the new executor", lambda: second.run("stty size") == "20 70\n")
    second.expect(PROMPT)
    second.sendline("exit 11")
    assert second.end() == 11


def test_a_restart_of_the_machine_is_told(stack: Stack, bob: User, recorder: Recorder, go: Path):
    recorder.excuse("I4")
    cut = detached(bob, "--gpus", "1", "--", "sleep", "1000")
    done = detached(bob, "--gpus", "0", "--", "sh", "-c", WAIT)
    wait_for("both", lambda: all(stack.sandboxes().get(id) for id in (cut, done)))
    pids = stack.sandboxes()
    stack.executor.kill(signal.SIGKILL)
    go.touch()
    wait_for("the end of one", lambda: not Path(f"/proc/{pids[done]}").exists())
    os.kill(pids[cut], signal.SIGKILL)  # as the end of a boot does
    with closing(sqlite3.connect(stack.state / "executor/ledger.db")) as ledger, ledger:
        assert ledger.execute("UPDATE facts SET value = 'of an earlier boot' WHERE name = 'boot'").rowcount == 1
    stack.start_executor()
    for id, code, why in ((cut, 137, "the machine was restarted"), (done, 0, None)):
        wait_for("the end", lambda id=id: bob.json("session", "get", id)[0]["status"].get("finalized"))
        status = bob.json("session", "get", id)[0]["status"]
        assert (status["exitCode"], status.get("message")) == (code, why)


@pytest.mark.parametrize("damage", ["lost", "corrupt"])
def test_a_lost_ledger_is_rebuilt_from_the_containers(stack: Stack, ada: User, damage: str):
    held = detached(ada, "--gpus", "1", "--name", "held", "--", "sleep", "1000")
    wait_for("it runs", lambda: len(stack.sandboxes()) == 1)
    stack.executor.kill(signal.SIGKILL)
    ledger = stack.state / "executor" / "ledger.db"
    for path in ledger.parent.glob("ledger.db*"):
        path.unlink() if damage == "lost" else path.write_bytes(b"garbage" * 5000)
    stack.start_executor()
    (job,) = ada.json("session", "list")
    assert (job["id"], job["name"], job["limits"]["gpus"]) == (held, "held", ["example.com/gpu=0"])
    second = detached(ada, "--gpus", "1", "--", "sleep", "1000")
    wait_for("the other GPU", lambda: ada.json("session", "get", second)[0]["limits"]["gpus"] == ["example.com/gpu=1"])


def test_without_the_server_known_people_go_on_and_it_learns_of_it_later(stack: Stack, ada: User):
    assert ada.beaker("session", "create", "--gpus", "0", "--", "true").returncode == 0
    stack.server.kill(signal.SIGKILL)
    done = ada.beaker("session", "create", "--gpus", "0", "--name", "offline", "--", "sh", "-c", "exit 8")
    assert done.returncode == 8, done.stderr
    stack.server.start()
    wait_for("the server", lambda: stack.admin.whoami())

    def reported() -> bool:
        jobs = [job for job in stack.admin.jobs(kind="session", finalized=True) if job.get("name") == "offline"]
        return [job["status"].get("exitCode") for job in jobs] == [8]

    wait_for("the late report", reported)


def test_a_revoked_token_closes_its_open_terminal(stack: Stack, ada: User, tty: type[Tty]):
    with closing(Client(stack.endpoint, ada.token)) as client:
        second = client.create_token({"name": "second"})
        ada.login(second["token"])
        try:
            terminal = tty(ada, "session", "create", "--gpus", "0")
            terminal.run("true")
        finally:
            ada.login(ada.token)
        client.revoke_token(second["id"])
    terminal.expect("(?i)token", timeout=15)
    assert terminal.end() == 77
    assert len(stack.sandboxes()) == 1, "the session itself goes on"
    assert ada.beaker("session", "exec", "--", "true").returncode == 0


def test_gpus_are_unique_by_the_ledgers_own_constraint(stack: Stack, ada: User):
    detached(ada, "--gpus", "2", "--", "sleep", "1000")
    wait_for("it runs", lambda: len(stack.sandboxes()) == 1)
    ledger = sqlite3.connect(stack.state / "executor" / "ledger.db")
    with pytest.raises(sqlite3.IntegrityError):
        ledger.execute("INSERT INTO claims SELECT gpu, session FROM claims LIMIT 1")
    ledger.close()


def test_a_container_removed_by_somebody_is_noticed(stack: Stack, ada: User, recorder: Recorder):
    recorder.excuse("I4")
    if stack.driver != "docker":
        pytest.skip("only Docker Engine lets somebody else remove a container")
    id = detached(ada, "--gpus", "1", "--", "sleep", "1000")
    wait_for("it runs", lambda: len(stack.sandboxes()) == 1)
    stack.docker_cli("rm", "-f", *stack.containers())
    wait_for("the end", lambda: ada.json("session", "get", id)[0]["status"].get("finalized"))


def test_a_docker_engine_that_is_killed_ends_no_session(stack: Stack, bob: User, go: Path):
    if stack.driver != "docker":
        pytest.skip("the other driver has no daemon")
    id = detached(bob, "--gpus", "1", "--", "sh", "-c", WAIT + "exit 12")
    other = detached(bob, "--gpus", "1", "--", "sleep", "1000")
    wait_for("both run", lambda: all(stack.sandboxes().get(one) for one in (id, other)))
    before = stack.sandboxes()
    stack.docker.kill(signal.SIGKILL)
    refused = bob.beaker("session", "create", "--gpus", "0", "--", "true")
    assert (refused.returncode, b"Docker Engine" in refused.stderr) == (69, True), refused.stderr
    assert {job["id"] for job in bob.json("session", "list")} >= {id, other}
    go.touch()
    wait_for("the end of one", lambda: not Path(f"/proc/{before[id]}").exists())
    assert Path(f"/proc/{before[other]}").exists()
    # A new engine that finds the old one's containerd, which is about to die with it, would start none.
    containerd = (stack.root / "exec/containerd/containerd.pid").read_text().strip()
    wait_for("the end of containerd", lambda: not Path("/proc", containerd).exists())
    stack.docker.start()
    wait_for("Docker Engine", lambda: stack.docker_cli("version").returncode == 0)
    wait_for("what happened meanwhile", lambda: bob.json("session", "get", id)[0]["status"].get("finalized"))
    assert bob.json("session", "get", id)[0]["status"]["exitCode"] == 12
    assert stack.sandboxes() == {other: before[other]}
    assert bob.beaker("session", "exec", other, "--", "true").returncode == 0


def test_memory_is_limited_and_said_so(ada: User):
    hog = "x = bytearray(400 << 20)"
    done = ada.beaker("session", "create", "--gpus", "0", "--memory", "64MiB", "--", "python3", "-c", hog)
    assert done.returncode == 137
    assert b"out of memory" in done.stderr


def test_the_end_of_all_sessions_leaves_them_time_and_no_new_one_starts(
    stack: Stack, ada: User, bob: User, tty: type[Tty]
):
    """What a shutdown does first. With systemd, and while mounts are there: `tests/units.sh`."""
    terminal = tty(ada, "session", "create", "--gpus", "0")
    terminal.run("true")
    saving = "trap 'echo saved > ~/saved; exit 4' TERM; echo > ~/waits; while :; do sleep 0.1; done"
    saves = detached(bob, "--gpus", "0", "--", "sh", "-c", saving)
    wait_for("its trap", (bob.home / "waits").exists)
    environment = {"BEAKER_SOCKET": str(stack.socket), "PATH": os.environ["PATH"]}
    done = subprocess.run([BIN / "beaker", "executor", "end-sessions"], env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (bob.home / "saved").read_text() == "saved\n"
    terminal.expect("stopped by the shutdown of this machine")
    assert terminal.end() != 0
    assert bob.json("session", "get", saves)[0]["status"]["exitCode"] == 4
    refused = bob.beaker("session", "create", "--gpus", "0", "--", "true")
    assert b"takes no new sessions: all sessions end" in refused.stderr
    stack.executor.kill(signal.SIGTERM)
    stack.start_executor()
    assert bob.beaker("session", "create", "--gpus", "0", "--", "true").returncode == 0
    for name in ("waits", "saved"):
        (bob.home / name).unlink()
