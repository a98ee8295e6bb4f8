"""Programs that attack a stack while others use it. Each runs alone, with the standard library, as whoever starts it.

Owns what an attacker does; what must not come of it is asserted by `e2e/test_attackers.py`. Each prints one JSON object
when it is told to end by the end of its standard input.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

HALF = b"POST /api/v3/jobs HTTP/1.1\r\nHost: lab\r\nContent-Length: 100\r\n"
SEARCHED = 1 << 16  # bytes of a file
KEPT = 500  # directories


def told_to_end() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


def poll(canary: str, *roots: str) -> dict:
    """Watch these directories for a moment in which something of a session can be reached.

    Opens every directory as it comes, since a descriptor outlives the moment, and looks through it then and later.
    Whatever holds the canary, and every socket that answers as a session's, is what it has found.
    """
    found: set[str] = set()
    kept: dict[tuple[int, int], int] = {}
    rounds = 0
    while not told_to_end():
        rounds += 1
        for root in roots:
            for path in directories(root, 4):
                with contextlib.suppress(OSError):
                    descriptor = os.open(path, os.O_PATH | os.O_DIRECTORY)
                    about = os.fstat(descriptor)
                    if (about.st_dev, about.st_ino) in kept or len(kept) >= KEPT:
                        os.close(descriptor)
                        continue
                    kept[about.st_dev, about.st_ino] = descriptor
                    search(descriptor, path, canary.encode(), found)
    for descriptor in kept.values():
        search(descriptor, "kept", canary.encode(), found)
    return {"rounds": rounds, "found": sorted(found), "kept": len(kept)}


def directories(root: str, depth: int) -> Iterator[str]:
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.path
                if depth:
                    yield from directories(entry.path, depth - 1)


def search(directory: int, name: str, canary: bytes, found: set[str]) -> None:
    """Look into the places of a session's root below a directory, as far as they are there."""
    for place in ("", "tmp", "run/beaker", "upper/tmp", "etc", "secrets"):
        with contextlib.suppress(OSError), os.scandir(f"/proc/self/fd/{directory}/{place}") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False):
                        with open(entry.path, "rb") as file:
                            if canary in file.read(SEARCHED):
                                found.add(f"{name}/{place}/{entry.name}")
                    elif entry.name in ("session.sock", "agent.sock") and answers(entry.path):
                        found.add(f"{name}/{place}/{entry.name}")


def answers(path: str) -> bool:
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_STREAM):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as one:
            one.settimeout(1)
            one.connect(path)
            one.sendall(b'{"v": 1, "op": "get"}')
            if b'"job"' in one.recv(SEARCHED):
                return True
    return False


def poll_processes(canary: str) -> dict:
    """Look through what `/proc` shows of other processes: roots, directories, descriptors, environments."""
    found: set[str] = set()
    rounds = 0
    while not told_to_end():
        rounds += 1
        for pid in filter(str.isdigit, os.listdir("/proc")):
            if int(pid) == os.getpid():
                continue
            for name in ("environ", "cmdline"):
                with contextlib.suppress(OSError), open(f"/proc/{pid}/{name}", "rb") as file:
                    text = file.read(SEARCHED)
                    if canary.encode() in text and os.path.basename(__file__).encode() not in text:
                        found.add(f"{name} of {pid}")
            for name in ("root", "cwd", "fd"):
                with contextlib.suppress(OSError):
                    if os.path.exists(f"/proc/{pid}/{name}/run/beaker/session.sock"):
                        found.add(f"{name} of {pid}")
    return {"rounds": rounds, "found": sorted(found)}


def flood_door(path: str, count: str) -> dict:
    """As many connections as there may be: some silent, some with half a request, some that ask and do not read."""
    held: list[socket.socket] = []
    made = refused = 0
    while not told_to_end():
        while len(held) < int(count):
            one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            one.settimeout(1)
            try:
                one.connect(path)
                made += 1
                if made % 3 == 1:
                    one.sendall(b'{"v": 1, "op": ')
                elif made % 3 == 2:
                    one.sendall(b'{"v": 1, "op": "list", "token": "no"}')
            except OSError:
                refused += 1
            held.append(one)
        time.sleep(0.2)
        for one in held[: len(held) // 4]:
            one.close()
        held = held[len(held) // 4 :]
    return {"made": made, "refused": refused}


def flood_server(host: str, port: str, count: str) -> dict:
    """As many half requests as there may be, each kept alive by a byte now and then."""
    held: list[socket.socket] = []
    made = 0
    while not told_to_end():
        for one in list(held):
            try:
                one.sendall(b"X")
            except OSError:
                held.remove(one)
                one.close()
        while len(held) < int(count):
            try:
                one = socket.create_connection((host, int(port)), timeout=1)
                one.sendall(HALF)
            except OSError:
                break
            held.append(one)
            made += 1
        time.sleep(0.2)
    return {"made": made, "held": len(held)}


def steal_ports(*ports: str) -> dict:
    """Inside a session that published ports: listen there, and keep what others say."""
    heard: list[str] = []

    def serve(port: int) -> None:
        with contextlib.suppress(OSError), socket.create_server(("", port), reuse_port=True) as listener:
            while True:
                one, _ = listener.accept()
                with one, contextlib.suppress(OSError):
                    one.settimeout(1)
                    heard.append(one.recv(SEARCHED).decode("latin-1"))
                    one.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")

    for port in ports:
        threading.Thread(target=serve, args=[int(port)], daemon=True).start()
    while not told_to_end():
        time.sleep(0.2)
    return {"heard": heard}


def rogue(address: str, token: str, hostname: str, node: str, jobs: str) -> dict:
    """With a good token of another executor: be the node `hostname`, speak for it, and finish its sessions."""
    host = address.partition("://")[2]
    answers: dict[str, int] = {}

    def call(method: str, path: str, body: object) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection(host, timeout=5)
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request(method, f"/api/v3/{path}", json.dumps(body), headers)
            status = connection.getresponse().status
            name = f"{method} {path.partition('/')[0]}"
            answers[name] = min(status, answers.get(name, 999))
            connection.close()

    while not told_to_end():
        limits = {"cpuCount": 1, "memory": 1 << 30, "gpuCount": 0, "gpuIds": []}
        instance = "01HW8DZJFR6QEAFAABCTCR2BY2"
        call("POST", "clusters/lab/main/nodes", {"hostname": hostname, "limits": limits, "instance": instance})
        call("POST", f"nodes/{node}/heartbeat", {"instance": instance, "version": "0", "free": {}, "queue": 0})
        call("DELETE", f"nodes/{node}", None)
        for job in jobs.split(","):
            call("PUT", f"jobs/{job}", {"id": job, "revision": 1000, "status": {}})
            call("PATCH", f"jobs/{job}", {"status": {"canceled": True}})
        time.sleep(0.1)
    return answers


ATTACKS: dict[str, Callable[..., dict]] = {
    "poll": poll,
    "poll_processes": poll_processes,
    "flood_door": flood_door,
    "flood_server": flood_server,
    "steal_ports": steal_ports,
    "rogue": rogue,
}

if __name__ == "__main__":
    print(json.dumps(ATTACKS[sys.argv[1]](*sys.argv[2:])), flush=True)
