"""The published ports of sessions, from the claim to the forwarder that serves them, and again when one was killed.

Owns the order of these steps: `ports` chooses and holds sockets, `forwarding` runs the processes.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from dataclasses import replace

from ..errors import Error
from ..model import Claim, Session
from ..sandbox import Sandboxes
from . import forwarding, ports
from .sessions import Sessions

log = logging.getLogger(__name__)


class Publisher:
    def __init__(self, sessions: Sessions, sandboxes: Sandboxes) -> None:
        self._sessions, self._sandboxes = sessions, sandboxes
        self._unpublished: set[str] = set()  # sessions with ports that are somebody else's by now

    def bind(self, id: str, session: Session, pins: ExitStack) -> tuple[Claim, ports.Sockets]:
        """The sockets of its ports, and the claim with the ports as they are. Before anything is made."""
        claim = session.claim or Claim()
        if not claim.ports:
            return claim, []
        mapped, sockets = self._sessions.ports.take(id, session.request, claim, self._sessions.live())
        for sock, _ in sockets:
            pins.callback(sock.close)
        if mapped != claim.ports:
            claim = replace(claim, ports=mapped)
            self._sessions.move(id, claim=claim)
        return claim, sockets

    def forward(self, id: str, sockets: ports.Sockets) -> None:
        """Serve a session's ports by these sockets. Raises Error internal."""
        init = self._sandboxes.init(id)
        if init is not None:  # else it has ended already
            try:
                forwarding.start(id, init, sockets)
            finally:
                os.close(init)

    def forward_again(self, sessions: list[Session]) -> None:
        """Start the forwarders that were killed, and those of sessions that a version without them made."""
        running = forwarding.running() if sessions else {}
        self._unpublished &= {session.id for session in sessions}
        for session in sessions:
            if session.id in running or not session.claim:
                continue
            try:
                sockets = ports.bind(session.claim.ports)
                try:
                    self.forward(session.id, sockets)
                finally:
                    for sock, _ in sockets:
                        sock.close()
                self._unpublished.discard(session.id)
                self._sessions.notice(session.id, "ports", "")
            except (Error, OSError) as error:
                if session.id not in self._unpublished:
                    self._unpublished.add(session.id)
                    log.warning("session %s: its ports are not published: %s", session.id, error)
                    why = error.message if isinstance(error, Error) else error.strerror
                    text = f"the ports of this session are not published any more: {why}; tried again every 10 seconds"
                    self._sessions.notice(session.id, "ports", text)
