"""Which TCP ports of this node lead to which session. A port is held like a GPU: by one session, until that is final.

Owns the choice of free ports. Must not open any for longer than it takes to see whether it is free: a driver does.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable

from ..errors import Error
from ..model import Request, Session

RANDOM = range(32768, 61000)  # as Docker does: where the kernel, too, looks for ports of nobody in particular


def check(request: Request, sessions: Iterable[Session]) -> None:
    """Raises Error conflict when a port of the node that was asked for is another session's or program's.

    sessions: all that are not final; one that waits holds the ports that it asked for, too.
    """
    holders = {port: session.id for session in sessions for port in _held(session)}
    for own, port in request.ports:
        if port and (port in holders or not _free(port)):
            whose = f"session {holders[port]}" if port in holders else "another program"
            raise Error("conflict", f"--port {port}:{own}: port {port} of this node is used by {whose}",
                        f"choose another, or leave it to the node: --port {own}")  # fmt: skip


def pick(request: Request, sessions: Iterable[Session]) -> tuple[tuple[int, int], ...]:
    """The claim for the ports of `request`: those of the node that it asked for, else free ones at random."""
    taken = {port for session in sessions for port in _held(session)}
    result = []
    for own, wanted in request.ports:
        free = (port for port in random.sample(RANDOM, len(RANDOM)) if port not in taken and _free(port))
        port = wanted or next(free, 0)
        if not port:
            raise Error("unavailable", "all ports of this node are in use", "try again when other sessions have ended")
        taken.add(port)
        result.append((own, port))
    return tuple(result)


def _held(session: Session) -> set[int]:
    return {port for _, port in (session.claim.ports if session.claim else session.request.ports)}


def _free(port: int) -> bool:
    """Whether no program of this machine listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
