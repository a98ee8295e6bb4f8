"""One process at the other end of the door: frames in and out, and the terminal that was handed to it.

Owns the wire format of the door; knows no sessions. Everything here runs in the loop and waits for nobody: a caller
that does not read is given PATIENCE seconds, and then its conversation ends.
"""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import logging
import os
import select
import socket
import termios
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager, suppress
from typing import Any, ParamSpec, TypeVar

from ..errors import Error
from ..sandbox import Terminal
from .incident import incident
from .loop import Loop, Workers
from .passing import read

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

FRAME = 128 * 1024  # bytes; a unix socket's packet is limited by its send buffer
LATER = 4096  # bytes of a frame after the first: a size, a signal, a word
PATIENCE = 10.0  # seconds that a silent or stuck client is given
BEAT = 3.0  # seconds between two signs of life to a caller that waits and asked for them


class Caller:
    """token: what it showed, checked again while it holds a terminal. agent: a descriptor that came with its first
    frame, -1 for none; closed with the caller. key: whose turn it is when `work` has to wait.
    """

    def __init__(self, loop: Loop, connection: socket.socket, workers: Workers, key: Hashable) -> None:
        self.loop, self.connection, self._workers, self._key = loop, connection, workers, key
        self.token, self.agent = "", -1
        self.readable = False  # a frame is there, or the end
        self._woken = asyncio.Event()
        self._wants_beats = False
        self._beating: asyncio.TimerHandle | None = None
        connection.setblocking(False)
        self._expect()

    async def work(self, act: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Do something that blocks."""
        return await self.loop.work(self._workers, self._key, act, *args, **kwargs)

    def wake(self) -> None:
        """End its `turn`. From any thread."""
        self.loop.soon(self._woken.set)

    async def turn(self, seconds: float) -> None:
        """Wait until a frame has come or somebody called `wake`, but no longer than this."""
        timer = self.loop.asyncio.call_later(seconds, self._woken.set)
        try:
            await self._woken.wait()
        finally:
            timer.cancel()
        self._woken.clear()

    async def first(self, *, takes: bool = False) -> dict[str, Any] | None:
        """The request, None when the caller left instead. Raises TimeoutError when it says nothing.

        takes: a descriptor may come with it, here and with no later frame. Raises Error.
        """
        deadline = time.monotonic() + PATIENCE
        while not self.readable:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            await self.turn(left)
        return await self.receive(FRAME, takes=takes)

    async def receive(self, limit: int = LATER, *, takes: bool = False) -> dict[str, Any] | None:
        """The frame that is there, None when the caller has left. Raises Error invalid for what is no JSON object."""
        try:
            if (found := read(self.connection, limit)) is not None:
                packet, is_cut = found
            elif takes:
                # Not refused from now on: of what waits already, a look would then no longer show that it has some.
                packet, is_cut, self.agent = await self.loop.passing.take(self.connection, self._key)
            else:
                raise Error("invalid", "no file goes with this frame", "update beaker")
        finally:
            self._expect()
        if not packet:
            return None
        if is_cut:
            raise Error(
                "invalid", f"this request is larger than {limit} bytes", "shorten the command or its environment"
            )
        try:
            frame = json.loads(packet)
        except (ValueError, RecursionError):
            frame = None
        if not isinstance(frame, dict):
            raise Error("invalid", "this frame is not a JSON object", "update beaker")
        return frame

    def beat(self, request: dict[str, Any]) -> None:
        """From now on say every BEAT seconds that the executor is alive, if this first frame asks for that.

        So a caller can tell one that is busy from one that was stopped. The loop says it, whatever the workers do.
        """
        self._wants_beats = request.get("beat") is True
        self.waits()

    def waits(self, does: bool = True) -> None:
        """Whether the caller waits for us now: not while it has a terminal, which needs no executor."""
        if self._beating:
            self._beating.cancel()
            self._beating = None
        if does and self._wants_beats:
            self._beating = self.loop.asyncio.call_later(BEAT, self._beat)

    def _beat(self) -> None:
        # Not to one that does not read, such as a stopped one: its socket must keep room for what matters.
        unread = fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))  # unix(7): SIOCOUTQ, the same number
        if not any(unread):
            self.try_send({"alive": True})
        self.waits()

    @property
    def has_left(self) -> bool:
        """Whether it has closed its end, perhaps with something unread before that. From any thread."""
        look = select.poll()
        look.register(self.connection, select.POLLRDHUP)
        return bool(look.poll(0))

    def close(self) -> None:
        self.waits(False)
        self.loop.asyncio.remove_reader(self.connection.fileno())
        self.loop.passing.close(self.connection)
        if self.agent >= 0:  # and nobody has taken it
            self.loop.passing.drop(self.agent)
            self.agent = -1

    def _expect(self) -> None:
        """One frame at a time: what has not been received yet waits in the kernel, which lets a caller send few."""
        self.readable = False
        self.loop.asyncio.add_reader(self.connection.fileno(), self._arrived)

    def _arrived(self) -> None:
        self.loop.asyncio.remove_reader(self.connection.fileno())
        self.readable = True
        self._woken.set()

    async def send(self, frame: dict[str, Any], descriptor: int | None = None) -> None:
        """Raises OSError when the caller has left, TimeoutError when it does not read."""
        packet = _encode(frame)
        while True:
            try:
                if descriptor is None:
                    self.connection.send(packet)
                else:
                    socket.send_fds(self.connection, [packet], [descriptor])
                return
            except BlockingIOError:  # it takes a packet whole or not at all
                await self.loop.ready(self.connection.fileno(), PATIENCE, to_write=True)

    def try_send(self, frame: dict[str, Any]) -> None:
        """Nothing where the caller has left or does not read."""
        with suppress(OSError):
            self.connection.send(_encode(frame))


def _encode(frame: dict[str, Any]) -> bytes:
    return json.dumps(frame, separators=(",", ":")).encode()


@asynccontextmanager
async def answering(caller: Caller) -> AsyncIterator[None]:
    """A conversation: what fails in it is said to the caller, and in the end the connection is closed."""
    try:
        try:
            yield
        except (ConnectionError, TimeoutError):
            pass  # the caller left, which ends nothing
        except Error as error:
            await _refuse(caller, error)
        except Exception:
            await _refuse(caller, incident(log))
    finally:
        caller.close()


async def _refuse(caller: Caller, error: Error) -> None:
    with suppress(OSError):
        await caller.send({"error": error.as_dict()})


class Held:
    """The executor's own handle on a terminal that a caller uses: to see it close, and to cut it off.

    It never reads. It must be closed with the conversation, or the engine would go on filling a pipe that nobody
    empties. tty: what reads it must keep up; a pipe may take its time.
    """

    def __init__(self, caller: Caller, tty: bool = False) -> None:
        self.caller, self.tty = caller, tty
        self.fd = -1
        self.is_cut = False
        self.hung_up = False  # the other side has closed it
        self.asked: float | None = None  # when it was last asked whether it reads, None once it has answered

    async def hand_over(self, terminal: Terminal, handle: str = "") -> None:
        """Give `terminal` to the caller, descriptor included."""
        try:
            self.close()
            self.fd = os.dup(terminal.fd)
            self.caller.loop.on_hangup(self.fd, self._closed)
            replay = base64.b64encode(terminal.replay).decode()
            event = {"event": "terminal", "framing": terminal.framing, "handle": handle, "replay": replay}
            self.caller.waits(False)
            await self.caller.send(event, terminal.fd)
        finally:
            os.close(terminal.fd)

    def ask(self) -> None:
        """When output waits for the caller, have it say that it reads, which a command line that is alive does at once.

        Without output, or an open question, nothing is asked.
        """
        count = bytearray(4)
        if self.fd >= 0 and self.tty:
            fcntl.ioctl(self.fd, termios.FIONREAD, count)
        if not any(count):
            self.asked = None
        elif self.asked is None:
            self.asked = time.monotonic()
            self.caller.try_send({"event": "read_on"})

    def silent(self, seconds: float) -> bool:
        """Whether a question is open for so long."""
        return self.asked is not None and time.monotonic() - self.asked >= seconds

    def cut(self) -> None:
        """End the connection for everybody who holds it; what runs in the sandbox goes on."""
        self.is_cut = True
        self.caller.wake()
        if self.fd >= 0:
            with suppress(OSError), socket.socket(fileno=os.dup(self.fd)) as shared:
                shared.shutdown(socket.SHUT_RDWR)

    def _closed(self) -> None:
        self.hung_up = True
        self.caller.waits()
        self.caller.wake()

    def close(self) -> None:
        if self.fd >= 0:
            self.caller.loop.forget_hangup(self.fd)
            os.close(self.fd)
            self.fd = -1
