"""The SSH agent of whoever attached last, as a session sees it: requests from inside go on to it, one at a time.

Owns the connections to agents that command lines hand over, and of the agents' protocol what is needed to pass messages
on (draft-miller-ssh-agent): a length of four bytes, then a message whose first byte is its type. It never opens an
agent's socket itself, which the executor could do with more rights than the user has.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from contextlib import closing, suppress

log = logging.getLogger(__name__)

LIMIT = 256 << 10  # bytes of a message, as in OpenSSH
PATIENCE = 60.0  # seconds: an agent may ask its user first
LOGINS = 8  # whose agents are kept for one session
REQUEST_IDENTITIES, IDENTITIES_ANSWER, FAILURE, EXTENSION = 11, 12, 5, 27


class Agents:
    """The agents of one session, the latest last."""

    def __init__(self) -> None:
        self._agents: list[socket.socket] = []
        self._lock = threading.Lock()

    def add(self, descriptor: int) -> None:
        """Take over a connection to an agent. Silent about anything else: it is whatever the user's variable named."""
        try:
            agent = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)
            return
        if (agent.family, agent.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
            agent.close()
            return
        agent.settimeout(PATIENCE)
        with self._lock:
            self._agents.append(agent)
            surplus = self._agents[:-LOGINS]
            self._agents = self._agents[-LOGINS:]
        for old in surplus:
            old.close()

    def serve(self, connection: socket.socket) -> None:
        """Answer one program inside until it leaves."""
        with closing(connection), suppress(OSError):
            connection.settimeout(None)
            while message := _receive(connection):
                _send(connection, self._answer(message))

    def close(self) -> None:
        with self._lock:
            agents, self._agents = self._agents, []
        for agent in agents:
            agent.close()

    def _answer(self, message: bytes) -> bytes:
        # A connection can be bound to one remote host by an extension; these serve many, so none is passed on.
        if message[0] != EXTENSION:
            with self._lock:
                while self._agents:
                    agent = self._agents[-1]
                    try:
                        _send(agent, message)
                        if answer := _receive(agent):
                            return answer
                    except OSError as error:
                        log.info("an agent does not answer: %s", error)
                    agent.close()
                    self._agents.pop()  # that login has ended: the one before may still be there
        if message[0] == REQUEST_IDENTITIES:
            return struct.pack(">BI", IDENTITIES_ANSWER, 0)
        return bytes([FAILURE])


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(struct.pack(">I", len(message)) + message)


def _receive(connection: socket.socket) -> bytes:
    """The next message, b"" at the end or for what is none."""
    head = _exactly(connection, 4)
    length = struct.unpack(">I", head)[0] if head else 0
    return _exactly(connection, length) if 0 < length <= LIMIT else b""


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := connection.recv(count - len(data))):
            return b""
        data += more
    return data
