"""One process at the other end of the door: frames in and out, and the terminal that was handed to it.

Owns the wire format of the door; knows no sessions.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import socket
import termios
import time
from contextlib import suppress
from typing import Any

from ..errors import Error
from ..sandbox import Terminal

FRAME = 128 * 1024  # bytes; a unix socket's packet is limited by its send buffer
PATIENCE = 10.0  # seconds that a silent or stuck client is given


class Caller:
    """token: what it showed, checked again while it holds a terminal. agent: a descriptor that came with its first
    frame, -1 for none; closed with the caller.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.token, self.agent = "", -1
        connection.settimeout(PATIENCE)

    def fileno(self) -> int:
        return self.connection.fileno()

    def receive(self) -> dict[str, Any] | None:
        """The next frame, None when the caller has closed. Raises Error invalid for anything but a JSON object."""
        packet, descriptors, flags, _ = socket.recv_fds(self.connection, FRAME, 1, socket.MSG_CMSG_CLOEXEC)
        for descriptor in descriptors:
            self.close()
            self.agent = descriptor
        if not packet:
            return None
        if flags & socket.MSG_TRUNC:
            raise Error(
                "invalid", f"this request is larger than {FRAME} bytes", "shorten the command or its environment"
            )
        try:
            frame = json.loads(packet)
        except (ValueError, RecursionError):
            frame = None
        if not isinstance(frame, dict):
            raise Error("invalid", "this frame is not a JSON object", "update beaker")
        return frame

    def close(self) -> None:
        """Drop the descriptor, unless somebody has taken it."""
        if self.agent >= 0:
            os.close(self.agent)
            self.agent = -1

    def send(self, frame: dict[str, Any], descriptor: int | None = None) -> None:
        """Raises OSError when the caller has left."""
        packet = json.dumps(frame, separators=(",", ":")).encode()
        if descriptor is None:
            self.connection.sendall(packet)
        else:
            socket.send_fds(self.connection, [packet], [descriptor])

    def refuse(self, error: Error) -> None:
        with suppress(OSError):
            self.send({"error": error.as_dict()})


class Held:
    """The executor's own handle on a terminal that a caller uses: to see it close, and to cut it off.

    It never reads. It must be closed with the conversation, or the engine would go on filling a pipe that nobody
    empties.
    """

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.fd = -1
        self.is_cut = False
        self.asked: float | None = None  # when it was last asked whether it reads, None once it has answered

    def hand_over(self, terminal: Terminal, handle: str = "") -> None:
        """Give `terminal` to the caller, descriptor included."""
        self.fd = os.dup(terminal.fd)
        try:
            replay = base64.b64encode(terminal.replay).decode()
            event = {"event": "terminal", "framing": terminal.framing, "handle": handle, "replay": replay}
            self.caller.send(event, terminal.fd)
        finally:
            os.close(terminal.fd)

    def ask(self) -> None:
        """When output waits for the caller, have it say that it reads, which a command line that is alive does at once.

        Without output, or an open question, nothing is asked.
        """
        count = bytearray(4)
        if self.fd >= 0:
            fcntl.ioctl(self.fd, termios.FIONREAD, count)
        if not any(count):
            self.asked = None
        elif self.asked is None:
            self.asked = time.monotonic()
            with suppress(OSError):
                self.caller.send({"event": "read_on"})

    def silent(self, seconds: float) -> bool:
        """Whether a question is open for so long."""
        return self.asked is not None and time.monotonic() - self.asked >= seconds

    def cut(self) -> None:
        """End the connection for everybody who holds it; what runs in the sandbox goes on."""
        self.is_cut = True
        if self.fd >= 0:
            with suppress(OSError), socket.socket(fileno=os.dup(self.fd)) as shared:
                shared.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
