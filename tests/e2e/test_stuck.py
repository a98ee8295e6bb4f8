"""What cannot be ended, as the kernel waits for a file system, and what was not, as its executor died meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.e2e.conftest import PROMPT, Tty
from tests.e2e.test_faults import detached
from tests.stack import BIN, Stack, User, wait_for


@pytest.fixture
def frozen(stack: Stack) -> Iterator[Path]:
    """A directory in sessions where whoever writes can not be killed, as on a server for files that is away."""
    place, image = stack.root / "net/frozen", stack.root / "frozen.img"
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    place.chmod(0o777)
    subprocess.run(["fsfreeze", "--freeze", place], check=True)
    yield place
    subprocess.run(["fsfreeze", "--unfreeze", place], check=False)
    stack.settle()
    subprocess.run(["umount", place], check=True)
    image.unlink()


def drained(stack: Stack, session: str) -> bool:
    """Whether the server says that the node takes nothing new, as this session does not end."""
    (node,) = stack.admin.list_nodes("lab/main")["data"]
    return node["status"] == "cordoned" and f"session {session} does not end" in node["cordonReason"]


def test_a_process_that_does_not_die_keeps_its_gpu_and_drains_the_node(
    stack: Stack, ada: User, bob: User, frozen: Path
):
    other = detached(bob, "--gpus", "0", "--name", "other", "--", "sleep", "1000")
    stuck = detached(ada, "--gpus", "1", "--name", "stuck", "--", "sh", "-c", f"echo x > {frozen}/file")
    waiting = detached(bob, "--gpus", "2", "--", "true")
    wait_for("both run", lambda: all(stack.sandboxes().get(id) for id in (stuck, other)))
    wait_for("the stop", lambda: stack.admin.update_job(stuck, {"status": {"canceled": True}}))
    wait_for("the drain", lambda: drained(stack, stuck), 90)
    refused = bob.beaker("session", "create", "--gpus", "0", "--", "true")
    assert (refused.returncode, stuck.encode() in refused.stderr) == (69, True), refused.stderr
    assert f"session {stuck} does not end" in bob.json("session", "get", waiting)[0]["reason"]
    assert bob.beaker("session", "exec", "other", "--", "true").returncode == 0
    stack.executor.kill(signal.SIGKILL)
    before = stack.executor.log.stat().st_size
    stack.start_executor()
    said = f"cordoned: session {stuck} ".encode()
    wait_for("the same from another executor", lambda: said in stack.executor.log.read_bytes()[before:], 90)
    assert ada.json("session", "get", stuck)[0]["limits"]["gpus"] == ["example.com/gpu=0"]
    assert bob.beaker("session", "stop", "other").returncode == 0, "others end as ever"

    subprocess.run(["fsfreeze", "--unfreeze", frozen], check=True)
    wait_for("the end", lambda: stuck not in stack.live())
    wait_for("the next", lambda: waiting not in stack.live())
    wait_for("the end of the drain", lambda: stack.admin.get_node("node-1.lab")["status"] == "ok")


def test_a_stop_goes_on_when_the_executor_was_killed_meanwhile(stack: Stack, ada: User):
    stubborn = detached(ada, "--gpus", "1", "--", "sh", "-c", "trap '' TERM; echo ready; while :; do sleep 1; done")
    wait_for("it is ready", lambda: ada.beaker("session", "logs", stubborn).stdout == b"ready\n")
    ending = subprocess.Popen(
        [BIN / "beaker", "session", "stop", stubborn], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **ada.process()
    )
    wait_for("the stop", lambda: ada.json("session", "get", stubborn)[0]["status"].get("canceled"))
    stack.executor.kill(signal.SIGKILL)
    stack.start_executor()
    ending.communicate()
    wait_for("the end", lambda: stubborn not in stack.live(), 40)
    status = ada.json("session", "get", stubborn)[0]["status"]
    assert (status["exitCode"], status["message"]) == (137, f"stopped by {ada.name}")


def test_a_server_that_does_not_answer_holds_nobody_up(stack: Stack, ada: User):
    assert ada.beaker("session", "create", "--gpus", "0", "--", "true").returncode == 0
    os.kill(stack.server.pid, signal.SIGSTOP)
    try:
        for code in (4, 5):
            done = ada.beaker(
                "session", "create", "--gpus", "0", "--name", f"slow-{code}", "--", "sh", "-c", f"exit {code}"
            )
            assert done.returncode == code, done.stderr
    finally:
        os.kill(stack.server.pid, signal.SIGCONT)

    def reported() -> bool:
        jobs = [job for job in stack.admin.jobs(kind="session", finalized=True) if "slow-" in job.get("name", "")]
        return sorted(job["status"].get("exitCode") for job in jobs) == [4, 5]

    wait_for("the late report", reported)


@pytest.fixture
def clock(stack: Stack, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Sets the clock that executor and server read, as `+1d`; the machine's own stays as it is."""
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    file = tmp_path / "clock"
    file.write_text("+0")
    # libfaketime 0.9.10 fails clock_nanosleep when it leaves monotonic clocks alone.
    slept = "import threading, time\ntime.sleep = lambda seconds: threading.Event().wait(seconds) and None\n"
    (tmp_path / "sitecustomize.py").write_text(slept)
    env = {
        "LD_PRELOAD": str(library), "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": str(tmp_path),
    }  # fmt: skip
    for process in (stack.server, stack.executor):
        process.kill(signal.SIGTERM)
        process.env = env
        process.start()
    wait_for("server and executor", lambda: stack.admin.whoami() and stack.answers())
    yield file.write_text
    for process in (stack.server, stack.executor):
        process.kill(signal.SIGTERM)
        process.env = None
        process.start()
    wait_for("server and executor", lambda: stack.admin.whoami() and stack.answers())


@pytest.mark.parametrize("jump", ["+1d", "-1d"])
def test_a_clock_that_jumps_by_a_day_ends_nothing(
    stack: Stack, ada: User, clock: Callable[[str], object], jump: str, tty: type[Tty]
):
    terminal = tty(ada, "session", "create", "--gpus", "1", "--timeout", "1h", "--name", "limited")
    terminal.run("true")
    waiting = detached(ada, "--gpus", "2", "--timeout", "1h", "--", "true")
    clock(jump)
    start = time.time() + (86400 if jump == "+1d" else -86400)

    def told() -> bool:
        if ada.beaker("session", "create", "--gpus", "0", "--", "true").returncode != 0:
            return False  # the server has just been started again
        latest = stack.admin.jobs(kind="session", finalized=True)
        return any(abs(datetime.fromisoformat(job["status"]["created"]).timestamp() - start) < 600 for job in latest)

    wait_for("the new time in what is recorded", told)
    time.sleep(12)  # the executor has looked at everything
    assert terminal.run("echo here") == "here\n"
    (job,) = [one for one in ada.json("session", "list") if one.get("name") == "limited"]
    assert not job["status"].get("canceled")
    assert ada.json("session", "get", waiting)[0]["queuePosition"] == 1
    wait_for("the node reports", lambda: stack.admin.get_node("node-1.lab")["status"] == "ok")
    terminal.expect(PROMPT)
    terminal.sendline("exit 3")
    assert terminal.end() == 3
    wait_for("the next", lambda: waiting not in stack.live())
