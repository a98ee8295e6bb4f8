"""What a session's processes and other users of the machine try, and do not get."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.stack import Stack, User, wait_for

# Speaks to the executor's door from inside, through a link to it in the home.
KNOCK = """
import json, socket, sys
door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
door.connect(sys.argv[1])
door.sendall(json.dumps({"v": 1, "op": "list", "token": sys.argv[2]}).encode())
print(door.recv(1 << 17).decode())
"""


def test_the_door_is_shut_to_processes_inside(stack: Stack, ada: User):
    """The socket is in the home, and so in the session, by a hard link; the token is the user's own and right."""
    door = ada.home / "door.sock"
    door.hardlink_to(stack.socket)
    try:
        outside = ada.run("/usr/bin/python3", "-c", KNOCK, str(door), ada.token)
        assert json.loads(outside.stdout) == {"end": True}, outside.stderr
        done = ada.beaker("session", "create", "--gpus", "0", "--", "python3", "-c", KNOCK, str(door), ada.token)
    finally:
        door.unlink()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["error"]["error"] == "forbidden"


# Connects, and ends when told to; its child then asks.
RELAY = """
import json, os, pathlib, socket, sys, time
door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
door.connect("door.sock")
if not os.fork():
    while not os.path.exists("ask"):
        time.sleep(0.01)
    door.sendall(json.dumps({"v": 1, "op": "list", "token": sys.argv[1]}).encode())
    pathlib.Path("answer").write_bytes(door.recv(1 << 17))
    os._exit(0)
while not os.path.exists("end"):
    time.sleep(0.01)
"""


def test_the_door_knows_a_caller_whose_pid_is_used_again(stack: Stack, ada: User):
    """The process that connected has ended, and another one of this machine, the user's own, has its number."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    if not last.exists():
        pytest.skip("needs a kernel that lets root choose the next pid")
    door, end, ask, answer = (ada.home / name for name in ("door.sock", "end", "ask", "answer"))
    door.hardlink_to(stack.socket)
    try:
        create = ("session", "create", "--gpus", "0", "--detach", "--", "bash", "-c", 'python3 -c "$0" "$1"; sleep 60')
        assert ada.beaker(*create, RELAY, ada.token).returncode == 0
        wait_for("two processes", lambda: len(_running("-c", RELAY, ada.token)) == 2)
        pid = min(_running("-c", RELAY, ada.token))
        end.touch()
        wait_for("the end of the first", lambda: not Path(f"/proc/{pid}").exists())
        for _ in range(100):  # others make processes too
            last.write_text(str(pid - 1))
            with subprocess.Popen(["sleep", "60"], user=ada.uid, group=ada.gid) as again:
                if again.pid == pid:
                    ask.touch()
                    wait_for("an answer", lambda: answer.exists() and answer.stat().st_size)
                again.kill()
            if again.pid == pid:
                break
        else:
            pytest.skip("somebody else got the pid")
        assert json.loads(answer.read_text())["error"]["error"] == "forbidden"
    finally:
        for path in (door, end, ask, answer):
            path.unlink(missing_ok=True)


def _running(*arguments: str) -> list[int]:
    """The processes of this machine that end with these arguments."""
    words = "\0".join(arguments).encode() + b"\0"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if line.endswith(words) and line.startswith(b"python3\0"):
            found.append(int(path.parent.name))
    return found


def test_other_peoples_homes_stay_shut(ada: User, bob: User):
    secret = bob.home / "secret"
    secret.write_text("bob's")
    secret.chmod(0o600)
    os.chown(secret, bob.uid, bob.gid)
    done = ada.beaker("session", "create", "--gpus", "0", "--", "cat", str(secret))
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_home_that_is_a_link_leads_only_where_its_owner_may_go(stack: Stack, bob: User):
    """Bob's home becomes a link to a directory of root's that nobody else may enter."""
    hidden, kept = stack.root / "hidden", bob.home.with_name("kept")
    hidden.mkdir(mode=0o700)
    config = (bob.home / ".beaker" / "config.yml").read_text()
    bob.home.rename(kept)
    bob.home.symlink_to(hidden)
    try:
        token = config.split("user_token: ")[1].strip()
        env = {"BEAKER_ADDR": stack.address, "BEAKER_TOKEN": token, "BEAKER_CONFIG": "/dev/null"}
        done = bob.beaker("session", "create", "--gpus", "0", "--", "ls", "-a", env=env, cwd="/")
    finally:
        bob.home.unlink()
        kept.rename(bob.home)
    assert done.returncode == 77, done.stderr
    assert str(bob.home).encode() in done.stderr


def test_a_session_sees_no_processes_of_the_machine(ada: User):
    script = "import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit())[-1] < 1000)"
    done = ada.beaker("session", "create", "--gpus", "0", "--", "python3", "-c", script)
    assert done.stdout == b"True\n"


def test_a_mount_path_swapped_during_the_start_is_open_to_its_user_or_nothing(stack: Stack, ada: User, bob: User):
    """A directory such as /net is a link that goes back and forth between one of bob's and one that ada keeps shut."""
    path, open_, shut = stack.root / "net", bob.home / "open", ada.home / "shut"
    for directory, owner in ((open_, bob), (shut, ada)):
        directory.mkdir(mode=0o700)
        (directory / "file").write_text(f"{owner.name}'s")
        os.chown(directory, owner.uid, owner.gid)
        os.chown(directory / "file", owner.uid, owner.gid)
    try:
        with _swapping(path, shut, open_):
            for _ in range(8):
                script = f"cat {path}/file; touch {path}/mine"
                done = bob.beaker("session", "create", "--gpus", "0", "--", "sh", "-c", script)
                assert ada.name.encode() not in done.stdout
                assert done.returncode in (0, 1, 77), done.stderr
        assert [file.name for file in shut.iterdir()] == ["file"]
    finally:
        path.unlink()
        shutil.rmtree(open_)
        shutil.rmtree(shut)


@contextlib.contextmanager
def _swapping(link: Path, *targets: Path) -> Iterator[None]:
    """A link that leads to one after the other, all the time, and to the last in the end."""
    spare, stopped = link.with_name(f"{link.name}-spare"), threading.Event()

    def swap() -> None:
        for target in itertools.cycle(targets):
            spare.symlink_to(target)
            spare.replace(link)
            if stopped.wait(0.0005):
                return

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        yield
    finally:
        stopped.set()
        swapper.join()


def test_a_home_swapped_during_the_start_is_ones_own_or_nothing(ada: User, bob: User):
    """Bob's home is a link that goes back and forth between his own directory and ada's, while he starts sessions."""
    (ada.home / "private").write_text("ada's")
    mode = ada.home.stat().st_mode & 0o7777
    ada.home.chmod(0o700)
    own = bob.home.with_name("bob-own")
    bob.home.rename(own)
    bob.home.symlink_to(own)
    try:
        with _swapping(bob.home, ada.home, own):
            for _ in range(8):
                words = ("session", "create", "--gpus", "0", "--", "sh", "-c", "cat private; touch mine")
                done = bob.beaker(*words, env={"BEAKER_TOKEN": bob.token}, cwd="/")
                assert b"ada's" not in done.stdout
    finally:
        bob.home.unlink()
        own.rename(bob.home)
        (ada.home / "private").unlink()
        ada.home.chmod(mode)
    assert not (ada.home / "mine").exists()
