"""The SSH agent of whoever attached last, as a session sees it: requests from inside go on to it, one at a time.

Owns the connections to agents that command lines hand over, and of the agents' protocol what is needed to pass messages
on (draft-miller-ssh-agent): a length of four bytes, then a message whose first byte is its type. It never opens an
agent's socket itself, which the executor could do with more rights than the user has.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct

from .loop import Loop
from .passing import read

log = logging.getLogger(__name__)

LIMIT = 256 << 10  # bytes of a message, as in OpenSSH
PATIENCE = 60.0  # seconds: an agent may ask its user first
LOGINS = 8  # whose agents are kept for one session
REQUEST_IDENTITIES, IDENTITIES_ANSWER, FAILURE, EXTENSION = 11, 12, 5, 27


class Agents:
    """The agents of one session, the latest last."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._agents: list[socket.socket] = []
        self._closed = False
        self._lock = asyncio.Lock()  # held for one question and its answer

    def add(self, descriptor: int) -> None:
        """Take over a connection to an agent. Silent about anything else: it is whatever the user's variable named.

        From any thread.
        """
        try:
            agent = socket.socket(fileno=descriptor)
        except OSError:
            self._loop.soon(self._loop.passing.drop, descriptor)  # an archive
            return
        # What it sends is not refused: a look would then no longer show that files wait already.
        self._loop.soon(lambda: self._loop.spawn(self._add(agent)))

    def close(self) -> None:
        """From any thread."""
        self._loop.soon(lambda: self._loop.spawn(self._close()))

    async def serve(self, connection: socket.socket) -> None:
        """Answer one program inside until it leaves."""
        try:
            while message := await self._receive(connection, None):
                await self._send(connection, await self._answer(message))
        except OSError:
            pass  # it left

    async def _add(self, agent: socket.socket) -> None:
        async with self._lock:
            self._agents.append(agent)
            while len(self._agents) > (0 if self._closed else LOGINS):
                self._drop(self._agents.pop(0))

    async def _close(self) -> None:
        async with self._lock:
            self._closed = True
            while self._agents:
                self._drop(self._agents.pop())

    def _drop(self, agent: socket.socket) -> None:
        """What its other side has sent may be anything, and more may come until it is closed."""
        self._loop.passing.drop(agent.detach())

    async def _answer(self, message: bytes) -> bytes:
        # A connection can be bound to one remote host by an extension; these serve many, so none is passed on.
        if message[0] != EXTENSION:
            async with self._lock:
                while self._agents:
                    agent, answer = self._agents[-1], b""
                    try:
                        async with asyncio.timeout(PATIENCE):
                            await self._send(agent, message)
                            answer = await self._receive(agent, PATIENCE)
                    except OSError as error:
                        log.info("an agent does not answer: %s", error)
                    finally:
                        if not answer:  # that login has ended, or is in the midst of an answer that nobody waits for
                            self._drop(self._agents.pop())
                    if answer:
                        return answer
        if message[0] == REQUEST_IDENTITIES:
            return struct.pack(">BI", IDENTITIES_ANSWER, 0)
        return bytes([FAILURE])

    async def _receive(self, connection: socket.socket, seconds: float | None) -> bytes:
        """The next message, b"" at the end or for what is none. seconds: to wait for its beginning, None for ever."""
        head = await self._exactly(connection, 4, seconds)
        length = struct.unpack(">I", head)[0] if head else 0
        return await self._exactly(connection, length, PATIENCE) if 0 < length <= LIMIT else b""

    async def _exactly(self, connection: socket.socket, count: int, seconds: float | None) -> bytes:
        data = b""
        while len(data) < count:
            try:
                more = read(connection, count - len(data))
            except BlockingIOError:
                await self._loop.ready(connection.fileno(), seconds)
                continue
            if not more or not more[0]:  # the end, or what no agent sends
                return b""
            data += more[0]
        return data

    async def _send(self, connection: socket.socket, message: bytes) -> None:
        data = memoryview(struct.pack(">I", len(message)) + message)
        while data:
            try:
                data = data[connection.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                await self._loop.ready(connection.fileno(), PATIENCE, to_write=True)
