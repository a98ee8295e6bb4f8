"""The executor's loop and workers: what one caller does or fails to do makes no other wait, and no thread is made."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from beaker_sessions.executor import caller
from beaker_sessions.executor import lifecycle as lifecycle_module
from beaker_sessions.executor.agent import Agents
from beaker_sessions.executor.caller import Caller
from beaker_sessions.executor.inside import Inside
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.lifecycle import Lifecycle
from beaker_sessions.executor.loop import Loop, Workers
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Identity, Request, State
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.settings import ExecutorSettings
from tests.stack import wait_for

SECONDS = 20.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    thread = threading.Thread(target=loop.asyncio.run_forever)
    thread.start()
    yield loop
    loop.soon(loop.asyncio.stop)
    thread.join()
    loop.passing.stop()
    loop.asyncio.close()


def wait(loop: Loop, coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, loop.asyncio).result(SECONDS)


def submit(workers: Workers, key: int, act: Callable[[], object]) -> threading.Event:
    """Set when it has been done."""
    done = threading.Event()

    def run() -> None:
        act()
        done.set()

    workers.submit(key, run)
    return done


def test_one_users_jobs_take_no_other_users_turn():
    workers, gate = Workers("test", threads=4, share=2, kept=1), threading.Event()
    stuck = [submit(workers, 1000, gate.wait) for _ in range(50)]
    assert submit(workers, 1001, bool).wait(SECONDS)
    more = [submit(workers, 1001, gate.wait) for _ in range(50)]
    assert submit(workers, 0, bool).wait(SECONDS), "root's, when no other thread is left"
    third = submit(workers, 1002, bool)
    assert not any(done.is_set() for done in (*stuck, *more, third))
    gate.set()
    assert all(done.wait(SECONDS) for done in (*stuck, *more, third))


def test_what_a_job_raises_is_raised_where_it_is_awaited(loop: Loop):
    async def fail() -> None:
        await loop.work(Workers("test", 1, 1), 1, int, "x")

    with pytest.raises(ValueError, match="x"):
        wait(loop, fail())


def test_who_does_not_read_is_given_up_and_others_are_served(loop: Loop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caller, "PATIENCE", 0.5)
    workers = Workers("test", 1, 1)

    async def send(connection: socket.socket, count: int) -> None:
        one = Caller(loop, connection, workers, 1)
        try:
            for _ in range(count):
                await one.send({"text": "x" * 10_000})
        finally:
            one.close()

    ours, silent = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stuck = asyncio.run_coroutine_threadsafe(send(ours, 1000), loop.asyncio)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with silent, theirs:
        wait(loop, send(mine, 1))
        assert len(theirs.recv(1 << 17)) > 10_000
        with pytest.raises(TimeoutError):
            stuck.result(SECONDS)


def test_signs_of_life_go_to_who_waits_and_reads(loop: Loop, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caller, "BEAT", 0.01)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(SECONDS)

    async def made() -> Caller:
        one = Caller(loop, ours, Workers("test", 1, 1), 1)
        one.beat({"beat": True})
        return one

    async def act(what: Callable[..., object], *words: object) -> None:
        what(*words)

    with theirs:
        one = wait(loop, made())
        for _ in range(3):
            assert theirs.recv(100) == b'{"alive":true}'
        wait(loop, asyncio.sleep(0.2))  # of the many that were due by now, one waits to be read
        wait(loop, act(one.waits, False))  # it has a terminal
        assert theirs.recv(100) == b'{"alive":true}'
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(100)
        theirs.settimeout(SECONDS)
        wait(loop, act(one.waits))
        assert theirs.recv(100) == b'{"alive":true}'
        wait(loop, act(one.close))
        assert theirs.recv(100) == b""


def test_an_agent_that_blocks_holds_up_its_own_session_alone(loop: Loop):
    """Whoever handed a connection over still holds it, and can have it block."""

    async def ask(agents: Agents) -> bytes:
        mine, theirs = socket.socketpair()
        with mine, theirs:
            theirs.setblocking(False)
            serving = loop.spawn(agents.serve(mine))
            await loop.asyncio.sock_sendall(theirs, b"\0\0\0\1\x0b")
            answer = await loop.asyncio.sock_recv(theirs, 100)
            theirs.shutdown(socket.SHUT_RDWR)
            await serving
        return answer

    stuck, other = Agents(loop), Agents(loop)
    handed, kept = socket.socketpair()
    with handed, kept:
        stuck.add(os.dup(handed.fileno()))
        handed.setblocking(True)
        handed.close()
        waiting = asyncio.run_coroutine_threadsafe(ask(stuck), loop.asyncio)
        assert kept.recv(100) == b"\0\0\0\1\x0b"
        assert wait(loop, ask(other)) == b"\0\0\0\5\x0c\0\0\0\0", "none, as it has no agent"
        kept.sendall(b"\0\0\0\5\x0c\0\0\0\1")
        assert waiting.result(SECONDS) == b"\0\0\0\5\x0c\0\0\0\1"
        stuck.close()
        assert kept.recv(100) == b""


# A socket that answers each connection; then accepting fails as told.
SERVER = """
import os, resource, socket, sys, time
from beaker_sessions.executor.listener import Listener
from beaker_sessions.executor.loop import Loop

async def serve(connection):
    with connection:
        connection.send(b"served")
        await asyncio.sleep(0)

import asyncio
loop, listening = Loop(), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
listening.bind(sys.argv[1])
listening.listen(8)
Listener(loop, listening, serve, loop.fail)
loop.start()
if sys.argv[2] == "broken":
    listening.shutdown(socket.SHUT_RDWR)
else:
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(int(sys.argv[2]) - len(os.listdir("/proc/self/fd")) + 1)]
    print("ready", flush=True)  # only now: who connects before is served
    sys.stdin.readline()
    for descriptor in taken:
        os.close(descriptor)
time.sleep(60)
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started = []

    def start(how: str, files: int = 0) -> subprocess.Popen[str]:
        limit = (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))) if files else None
        command, pipes = [sys.executable, "-c", SERVER, tmp_path / "socket", how], subprocess.PIPE
        started.append(subprocess.Popen(command, stdin=pipes, stdout=pipes, stderr=pipes, text=True, preexec_fn=limit))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_when_nothing_can_be_accepted_any_more_the_process_ends(serve: Callable[..., subprocess.Popen[str]]):
    process = serve("broken")
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == -signal.SIGTERM, said
    assert "serves nobody any more" in said


def test_without_a_free_descriptor_callers_wait(serve: Callable[..., subprocess.Popen[str]], tmp_path: Path):
    process = serve("64", files=64)
    assert process.stdout
    assert process.stdin
    assert process.stdout.readline() == "ready\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.connect(str(tmp_path / "socket"))
        door.settimeout(1)
        with pytest.raises(TimeoutError):
            door.recv(100)
        process.stdin.write("\n")
        process.stdin.flush()
        door.settimeout(SECONDS)
        assert door.recv(100) == b"served"


def test_a_start_for_which_there_is_no_thread_is_made_up_for(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    driver, ledger = FakeSandboxes(), Ledger(tmp_path / "ledger.db")
    sessions = Sessions(ledger, Inventory("gpu-1", 8.0, 1 << 36, ()))
    inside = Inside(loop, tmp_path / "sessions", "http://127.0.0.1:9", driver.init)
    lifecycle = Lifecycle(sessions, driver, ExecutorSettings(storage_path=str(tmp_path)), inside, "test")
    lifecycle.reconcile()

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    ann = Identity("ann", 1500, 1500, "/home/ann")
    wanted = Request(gpus=0, cpus=1.0, memory=0, image="nowhere", bare=True, command=("true",))
    with monkeypatch.context() as none_left:
        none_left.setattr(threading.Thread, "start", fail)
        id = sessions.create("ann", ann, wanted, None).id
    assert sessions.view(id).session.state == State.SCHEDULED
    lifecycle.reconcile()
    wait_for("its end, as there is no such image", lambda: sessions.view(id).session.state == State.FINALIZED)
    wait_for("the end of what cleans up, which still asks the ledger for the queue", lambda: not lifecycle._busy)
    ledger.close()


def test_the_firewall_is_looked_after_while_a_session_runs_and_none_starts(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    looked, ledger = threading.Event(), Ledger(tmp_path / "ledger.db")
    driver = FakeSandboxes()
    monkeypatch.setattr(driver, "guard", looked.set)
    monkeypatch.setattr(lifecycle_module, "RECONCILE_EVERY", 0.1)
    sessions = Sessions(ledger, Inventory("gpu-1", 8.0, 1 << 36, ()))
    inside = Inside(loop, tmp_path / "sessions", "http://127.0.0.1:9", driver.init)
    lifecycle = Lifecycle(sessions, driver, ExecutorSettings(storage_path=str(tmp_path)), inside, "test")
    lifecycle.reconcile()
    sessions.on_start = str
    id = sessions.create("ann", Identity("ann", 1500, 1500, "/home/ann"), Request(gpus=0, image="x"), None).id
    monkeypatch.setattr(lifecycle, "reconcile", lambda: None)
    threading.Thread(target=lifecycle._tick, daemon=True).start()
    assert not looked.wait(3), "nothing runs that it would protect"
    sessions.move(id, State.STARTED, started=datetime.now(UTC))
    assert looked.wait(SECONDS)
    sessions.ended(id, 0)
    ledger.close()


def test_a_loop_with_nothing_to_do_costs_next_to_nothing():
    """Its watchdog looks now and then, and does not spin."""
    program = (
        "import time; from beaker_sessions.executor.loop import Loop; loop = Loop(); loop.start()\n"
        "before = time.process_time(); time.sleep(2); print(time.process_time() - before, flush=True)\n"
        "import os; os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert float(done.stdout) < 0.5, "seconds of CPU in 2 s"
