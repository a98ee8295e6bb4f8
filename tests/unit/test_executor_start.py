"""An executor that begins beside another, that cannot serve any more, or that has too many callers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor import door, fence
from beaker_sessions.executor.door import Door
from beaker_sessions.executor.loop import Loop, Workers

HOLD = """
import pathlib, sys
from beaker_sessions.executor import fence
lock = fence.hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""

# A loop that stands still, in a process that would go on.
STILL = """
import time
from beaker_sessions.executor import loop
loop.STILL = 2
one = loop.Loop()
one.start()
one.soon(time.sleep, 600)
time.sleep(600)
"""


def test_a_state_has_one_executor(tmp_path: Path):
    path, pipe = tmp_path / "executor" / "lock", subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdin=pipe, stdout=pipe) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(Error, match=f"process {other.pid}"):
            fence.hold(path)
        other.kill()
        other.wait()
        os.close(fence.hold(path))


def test_the_lock_of_a_process_that_is_dead_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its files are open, as they are where a thread of it cannot end: here by a copy that somebody else holds."""
    path, kept = tmp_path / "lock", None
    monkeypatch.setattr(fence, "PATIENCE", 0.2)
    kept = fence.hold(path)
    dead = subprocess.Popen(["true"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie
    os.pwrite(kept, f"{dead.pid}\n".encode(), 0)
    os.ftruncate(kept, len(str(dead.pid)))
    mine = fence.hold(path)
    assert path.read_text() == str(os.getpid())
    dead.wait()
    os.close(mine)
    os.close(kept)


def test_a_lock_of_which_nobody_knows_the_holder_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk was full when it was taken."""
    path = tmp_path / "lock"
    monkeypatch.setattr(fence, "PATIENCE", 0.2)
    kept = fence.hold(path)
    os.ftruncate(kept, 0)
    with pytest.raises(Error, match="another executor"):
        fence.hold(path)
    os.close(kept)


def test_a_directory_in_the_place_of_the_lock(tmp_path: Path):
    path = tmp_path / "lock"
    path.mkdir()
    os.close(fence.hold(path))
    assert path.is_file()


def test_the_socket_of_one_that_does_not_answer_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(door, "PROBE", 0.2)
    loop, path = Loop(), str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
        dead.listen(1)
        one = Door.__new__(Door)
        one.loop, one.path = loop, path
        one._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        one.listen()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as caller:
            caller.connect(path)
            one._socket.accept()[0].close()
        one._socket.close()
    loop.passing.stop()
    loop.asyncio.close()


def test_whoever_is_refused_hears_it_though_they_asked():
    loop = Loop()
    one = Door.__new__(Door)
    one.loop, one._quick, one._refused, one._callers = loop, Workers("test", 1, 1), 1, Counter({1000: 512})
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        theirs.send(b'{"op": "list"}')
        # A thread of its own: this one may have a loop already, which a browser's tests leave running.
        refusing = threading.Thread(target=lambda: loop.asyncio.run_until_complete(one._refuse(ours, 1000)))
        refusing.start()
        refusing.join()
        assert b"512 connections" in theirs.recv(1 << 17)
    loop.passing.stop()
    loop.asyncio.close()


def test_a_loop_that_stands_still_ends_the_process():
    done = subprocess.run([sys.executable, "-c", STILL], capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"stood still" in done.stderr
