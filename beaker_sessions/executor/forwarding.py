"""The forwarders of published ports: started, found and ended. Each is a process that outlives the executor.

Owns: how they are started and known again. Nothing is written down: a forwarder is a process with the session's id
among its arguments that runs as the forwarders' user, which nobody can imitate. It ends with the session's first
process by itself, so that nothing has to be removed, whoever died when.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from ..errors import Error
from ..sandbox import commands, delegated
from . import forwarder

NAME = b"/forwarder.py"  # wherever an earlier version was installed
START = 10.0  # seconds
GONE = 5.0  # seconds in which one that was killed must end


def start(id: str, init: int, sockets: Sequence[tuple[socket.socket, int]]) -> None:
    """Serve these bound sockets, each with the port inside. init: a pidfd of the session's first process.

    Raises Error internal when the forwarder does not start although the session goes on.
    """
    command = [sys.executable, "-I", "-S", forwarder.__file__, id, str(init)]
    command += [f"{sock.fileno()}:{port}" for sock, port in sockets]
    environment = {"CGROUPS": os.pathsep.join(map(str, delegated.holders()))}
    fds = [init, *(sock.fileno() for sock, _ in sockets)]
    try:
        done = subprocess.run(
            command, env=environment, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, cwd="/", timeout=START, check=False,
        )  # fmt: skip
        said = done.stderr.decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        said = f"nothing within {START:g} s"
    else:
        if done.returncode == 0:
            return
    if not ended(init):
        raise Error("internal", f"the ports of session {id} cannot be published: {said}")


def ended(init: int) -> bool:
    """Whether the process of a pidfd has ended."""
    poll = select.poll()
    poll.register(init, select.POLLIN)
    return bool(poll.poll(0))


def running() -> dict[str, int]:
    """The forwarders of this machine, whichever executor started them: pids by session ids."""
    found = {}
    for pid, words in commands.of(forwarder.NOBODY):  # whatever another's command looks like
        if words[1:3] == [b"-I", b"-S"] and len(words) > 4 and words[3].endswith(NAME):
            found[words[4].decode(errors="replace")] = pid
    return found


def end(id: str) -> None:
    """Wait for the end of a session's forwarder; the session has ended. Raises Error unavailable when it does not."""
    now = time.monotonic()
    patience, deadline = now + forwarder.DRAIN + 0.5, now + GONE
    while pid := running().get(id):
        if time.monotonic() > patience:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise Error("unavailable", f"the forwarder of session {id}, process {pid}, does not end")
        time.sleep(0.005)
