"""A network namespace for each process that runs tests.

No port, bridge, route or rule is shared with the machine, its sessions, or the tests that run beside these. The way to
the machine's own network stays open for what downloads.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Callable

CLONE_NEWNET = 0x40000000  # sched.h
_libc = ctypes.CDLL(None, use_errno=True)
_machine = -1


def leave() -> None:
    """Go to an empty network with a loopback, with all threads and programs started from now on. Needs root."""
    global _machine
    _machine = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    _check(_libc.unshare(CLONE_NEWNET))
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def on_the_machine(call: Callable[[], object]) -> None:
    """Call it in the network that this process left, if it did."""
    if _machine < 0:
        call()
        return
    _inside(_machine, call)


def inside(pid: int, call: Callable[[], object]) -> None:
    """Call it in the network of a process; sockets that it makes stay there."""
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _inside(descriptor, call)
    finally:
        os.close(descriptor)


def _inside(network: int, call: Callable[[], object]) -> None:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            _check(_libc.setns(network, CLONE_NEWNET))
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)  # a thread can change its network alone
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


def left() -> list[str]:
    """Bridges, and rules of the firewall, in this process's network, if it has one of its own."""
    if _machine < 0:
        return []
    links = json.loads(_output("ip", "-json", "link", "show", "type", "bridge") or "[]")
    rules = [line for line in _output("iptables-save").splitlines() if line.startswith("-A")]
    return [f"bridge {link['ifname']}" for link in links if link] + [f"rule {rule}" for rule in rules]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
