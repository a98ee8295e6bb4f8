"""Whoever opens too much, reads nothing or stands at another's socket: everybody else is served as before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.stack import Stack, User, wait_for

# Opens connections to the door, asks something on each if told to, says how many got which answer at once, and holds
# all of them, with the descriptors that came, until its standard input ends.
FLOOD = """
import collections, json, resource, socket, sys, time
path, count, request = sys.argv[1], int(sys.argv[2]), sys.argv[3].encode()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held, said = [], collections.Counter()
for _ in range(count):
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        door.connect(path)
        door.settimeout(20)
        if request:
            door.sendall(request)
            answer, came, _, _ = socket.recv_fds(door, 1 << 17, 1)
            held += came
            if not came:
                said[json.loads(answer)["error"]["error"] if answer else "closed"] += 1
    except OSError as error:
        said[type(error).__name__] += 1
    held.append(door)
time.sleep(0.5)
for door in held if not request else ():
    door.settimeout(0)
    try:
        said[json.loads(door.recv(1 << 17) or '{"error": {"error": "closed"}}')["error"]["error"]] += 1
    except OSError:
        said["nothing"] += 1
print(json.dumps(said), flush=True)
sys.stdin.read()
"""

# Asks at the socket of a session, as the command line does there.
ASK = """
import json, socket
door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
door.connect("/run/beaker/session.sock")
door.sendall(json.dumps({"v": 1, "op": "get"}).encode())
answer = json.loads(door.recv(1 << 17))
print(answer.get("error", {}).get("error") or answer["job"]["id"])
"""

# Asks at its agent's socket for identities: how many bytes come.
ASK_AGENT = """
import socket
agent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
agent.connect("/run/beaker/agent.sock")
try:
    agent.sendall(b"\\0\\0\\0\\1\\x0b")
    print(len(agent.recv(100)))
except ConnectionError:
    print(0)
"""


@contextmanager
def flood(stack: Stack, user: User, count: int, request: str = "") -> Iterator[dict[str, int]]:
    command = [sys.executable, "-c", FLOOD, str(stack.socket), str(count), request]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, **user.process()) as flooding:
        assert flooding.stdout
        assert flooding.stdin
        yield json.loads(flooding.stdout.readline())
        flooding.stdin.close()


@pytest.fixture
def few_processes(stack: Stack) -> Iterator[int]:
    """The executor may have so many processes and threads, those of sessions aside."""
    controller = Path("/sys/fs/cgroup/pids")
    group = (controller if controller.is_dir() else Path("/sys/fs/cgroup")) / f"flood-{stack.bridge}"
    group.mkdir()
    if not (group / "pids.max").exists():
        group.rmdir()
        pytest.skip("needs the pids controller")
    (group / "pids.max").write_text("250")
    (group / "cgroup.procs").write_text(str(stack.executor.pid))
    yield 250
    for pid in (group / "cgroup.procs").read_text().split():
        (group.parent / "cgroup.procs").write_text(pid)
    group.rmdir()
    stack.executor.kill()
    stack.start_executor()


def threads(stack: Stack) -> int:
    return len(list(Path(f"/proc/{stack.executor.pid}/task").iterdir()))


def memory(stack: Stack) -> int:
    """Bytes that the executor holds, those of files aside, and that files in memory hold on the whole machine."""
    status, machine = Path(f"/proc/{stack.executor.pid}/status").read_text(), Path("/proc/meminfo").read_text()
    return sum(
        int(text.partition(name)[2].split()[0]) << 10 for text, name in ((status, "RssAnon:"), (machine, "Shmem:"))
    )


def started(user: User, *words: str) -> str:
    """The id of a new session that runs."""
    create = ("session", "create", "--gpus", "0", "--detach", *words)
    id = user.beaker(*create).stdout.decode().strip()
    wait_for("the session", lambda: user.json("session", "get", id)[0]["status"].get("started"))
    return id


def test_a_flood_of_connections_holds_nobody_else_up(stack: Stack, ada: User, bob: User, few_processes: int):
    """More than a thread each would allow, and then more than anybody may hold."""
    for count, some_refused in ((400, False), (1500, True)):
        with flood(stack, bob, count) as said:
            assert stack.answers(), "root"
            done = ada.beaker("session", "create", "--gpus", "0", "--", "echo", "served")
            assert (done.returncode, done.stdout) == (0, b"served\n"), done.stderr
            assert threads(stack) < few_processes
            assert set(said) <= ({"nothing", "unavailable", "closed"} if some_refused else {"nothing"}), said
            if some_refused:
                wait_for("a refusal", lambda: b"connections to the exec" in bob.beaker("session", "list").stderr)
    wait_for("the end of the flood", lambda: bob.beaker("session", "list").returncode == 0)


def test_output_that_nobody_reads_costs_the_executor_nothing(stack: Stack, ada: User):
    id = started(ada, "--", "sh", "-c", "head -c 1100000 /dev/zero | tr '\\0' x | fold -w 1000; sleep 1000")
    wait_for("the output", lambda: len(ada.beaker("session", "logs", id).stdout) == 1 << 20)
    before, running = memory(stack), threads(stack) + 10  # what starts and ends sessions has threads that come and go
    request = json.dumps({"v": 1, "op": "logs", "token": ada.token, "id": id})
    for ended in (False, True):
        if ended:
            assert ada.beaker("session", "stop", id).returncode == 0
        with flood(stack, ada, 200, request) as said:
            assert said == {}
            assert threads(stack) <= running
            assert memory(stack) - before < 100 << 20  # and not a megabyte each
            assert len(ada.beaker("session", "logs", id).stdout) == 1 << 20


def outsider(id: str, stack: Stack, program: str, *namespaces: str) -> str:
    """What a program of root's says that is in the session's mount namespace and in the others that are given."""
    pid = stack.sandboxes()[id]
    command = ["nsenter", f"--mount=/proc/{pid}/ns/mnt", *namespaces, "python3", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_sessions_sockets_serve_its_own_processes_alone(stack: Stack, ada: User, bob: User):
    """Whoever got hold of them: the machine's root, and another session's processes."""
    own, other = started(ada, "--", "sleep", "1000"), started(bob, "--", "sleep", "1000")
    pid, others = stack.sandboxes()[own], stack.sandboxes()[other]
    within, users = f"--pid=/proc/{pid}/ns/pid", f"/proc/{pid}/ns/user"
    root = [] if os.path.samefile(users, "/proc/self/ns/user") else [f"--user={users}"]  # who alone may make such
    for namespaces, answer, count in (
        ((), "forbidden", 0),
        ((f"--pid=/proc/{others}/ns/pid",), "forbidden", 0),
        ((within,), own, 9),
        ((within, *root, "unshare", "--pid", "--fork"), own, 9),  # as a sandbox in the session would be
    ):
        assert outsider(own, stack, ASK, *namespaces) == answer, namespaces
        assert outsider(own, stack, ASK_AGENT, *namespaces) == str(count), namespaces
    assert f"session {own}".encode() in stack.executor.log.read_bytes()
    for program, answer in ((ASK, own), (ASK_AGENT, "9")):
        executed = ada.beaker("session", "exec", own, "--", "python3", "-c", program)
        assert executed.stdout.decode().strip() == answer, executed.stderr
        first = ada.beaker("session", "create", "--gpus", "0", "--", "python3", "-c", program)
        assert first.returncode == 0, first.stderr
        assert b"forbidden" not in first.stdout
    stack.executor.kill()
    stack.start_executor()
    wait_for("its socket", lambda: outsider(own, stack, ASK, within) == own)
    assert outsider(own, stack, ASK) == "forbidden"
