"""The executor's door as a client: a SOCK_SEQPACKET connection whose packets are JSON objects, some with a descriptor.

Owns connecting, framing, how long a question waits, and turning what the kernel reports into `errors.Error`. The frames
themselves are described in docs/architecture.md, "The door". An executor that is alive says so every few seconds to
whoever waits, so one that was stopped is told from one that is busy. Uses `_socket`, because `socket` costs
milliseconds and adds nothing needed here.
"""

from __future__ import annotations

import os
import sys
from _socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SO_SNDTIMEO,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from time import monotonic

from ..errors import Error
from . import codec, config, output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

SOCKET = "/run/beaker/executor.sock"
SESSION = "/run/beaker/session.sock"  # in a session: its own, which knows whose it is without a token
FRAME = 128 << 10  # bytes
QUIET = 8.0  # seconds without an answer after which the user is told,
SILENT = 30.0  # and without a sign of life after which a question ends
ANSWER = 120.0  # seconds that an answer may take while the executor is alive
DEAD = "The executor of this machine does not answer; still waiting for it. (Press Ctrl+C to leave)"
RESTART, START = 10.0, 1.0  # seconds to wait for an executor that was there, and for one that perhaps never is
BUSY = "Still waiting for the executor of this machine. (Press Ctrl+C to leave)"


class Silence(Exception):
    """Nothing came in time."""


class Away(Exception):
    """The executor closed the connection, or is not there to be connected to: it may be restarting."""


def path() -> str:
    return os.environ.get("BEAKER_SOCKET") or (SESSION if inside() else SOCKET)


def inside() -> bool:
    """Whether this runs in a session."""
    return os.path.exists(SESSION)


class Door:
    """A connection to the executor of this machine. Raises Error unavailable when none answers.

    waits: until others have been let in, else Silence is raised when they are too many.
    """

    def __init__(self, waits: bool = True) -> None:
        self._socket = socket(AF_UNIX, SOCK_SEQPACKET)
        self._told = False  # that the answer takes long
        try:
            if waits:
                self._connect()
            else:
                self._socket.settimeout(0)
                self._socket.connect(path())
                self._socket.settimeout(None)
        except BlockingIOError:
            self.close()
            raise Silence from None
        except Error:
            self.close()
            raise
        except FileNotFoundError:
            self.close()
            raise Error(
                "unavailable", f"no executor answers at {path()}", "run this on a node: see beaker node list"
            ) from None
        except PermissionError:
            self.close()
            raise Error(
                "forbidden", f"no permission to connect to {path()}", "mend it with: beaker executor doctor"
            ) from None
        except OSError:
            self.close()
            hint = "ask for it to be started, or see: beaker executor doctor"
            raise Error("unavailable", f"no executor answers at {path()}", hint) from None

    def _connect(self) -> None:
        for seconds in (QUIET, SILENT - QUIET):
            # Not `settimeout`: with it, connecting would fail at once, instead of waiting, while many others connect.
            # A `struct timeval` of a 64-bit machine.
            limit = b"".join(int(part).to_bytes(8, sys.byteorder) for part in (seconds, seconds % 1 * 1e6))
            self._socket.setsockopt(SOL_SOCKET, SO_SNDTIMEO, limit)
            try:
                self._socket.connect(path())
                return
            except BlockingIOError:
                self._tell(DEAD)
        raise _dead()

    def _tell(self, text: str) -> None:
        if not self._told:
            self._told = True
            output.say(text)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def send(self, frame: dict[str, Any], agent: bool = False) -> None:
        """Send one frame, and a connection to the user's SSH agent if that is wanted and there is one.

        Raises Away, or Error invalid when the frame is too long.
        """
        data = codec.dumps(frame).encode()
        if len(data) > FRAME:
            raise Error("invalid", f"the command and its environment are too long ({len(data)} bytes)", "use a script")
        connection = _agent() if agent and not inside() else None  # there it has one
        rights = [(SOL_SOCKET, SCM_RIGHTS, connection.fileno().to_bytes(4, sys.byteorder))] if connection else []
        try:
            self._socket.sendmsg([data], rights, MSG_NOSIGNAL)
        except OSError:
            raise Away from None
        finally:
            if connection:
                connection.close()

    def try_send(self, frame: dict[str, Any]) -> bool:
        """Send a frame without waiting; False when the executor takes none now."""
        self._socket.settimeout(0)  # with another, `sendmsg` would wait before it tries
        try:
            self._socket.sendmsg([codec.dumps(frame).encode()], [], MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def answer(self, limit: float = ANSWER) -> tuple[dict[str, Any], int]:
        """The next frame that says something, and its descriptor.

        limit: seconds that it may take while signs of life come. Says once when it takes long. Raises Away at the end,
        the Error that the frame holds, or Error unavailable.
        """
        began = heard = monotonic()
        while True:
            now = monotonic()
            if now - heard >= SILENT:
                raise _dead()
            if now - began >= limit:
                what = f"the executor of this machine has not answered for {limit:g} s"
                raise Error("unavailable", what, "what you asked for may still happen")
            if now - began >= QUIET:
                self._tell(DEAD if now - heard >= QUIET else BUSY)
            ends = [began + limit, heard + SILENT] + ([] if self._told else [began + QUIET])
            try:
                frame, fd = self.receive(max(0.001, min(ends) - now))
            except Silence:
                continue
            if not frame.get("alive"):
                return frame, fd
            heard = monotonic()

    def receive(self, timeout: float = QUIET) -> tuple[dict[str, Any], int]:
        """The next frame and its descriptor, -1 for none. timeout: seconds.

        Raises Away at the end, the Error that the frame holds, or Silence when nothing comes in time.
        """
        self._socket.settimeout(timeout)
        try:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(FRAME, CMSG_SPACE(4), MSG_CMSG_CLOEXEC)
            except ConnectionResetError:
                # It closed without reading all that we said, which the kernel tells before its last words.
                data, ancillary, _, _ = self._socket.recvmsg(FRAME, CMSG_SPACE(4), MSG_CMSG_CLOEXEC)
        except ConnectionError:
            raise Away from None
        except OSError:
            raise Silence from None
        fd = -1
        for level, kind, content in ancillary:
            if (level, kind) == (SOL_SOCKET, SCM_RIGHTS) and len(content) >= 4:
                fd = int.from_bytes(content[:4], sys.byteorder)
        if not data:
            raise Away
        try:
            frame: dict[str, Any] = codec.loads(data.decode())
        except ValueError as error:
            raise Error("internal", f"the executor sent a broken frame: {error}", "are both of one version?") from None
        if "error" in frame:
            raise Error.from_dict(frame["error"])
        return frame, fd


def _dead() -> Error:
    hint = "what you asked for may still happen when it does; what is wrong says: sudo beaker executor doctor"
    return Error("unavailable", "the executor of this machine does not answer", hint)


def _agent() -> socket | None:
    """A connection to the user's SSH agent, None when there is none: a session does without."""
    where = os.environ.get("SSH_AUTH_SOCK")
    if not where:
        return None
    agent = socket(AF_UNIX, SOCK_STREAM)
    try:
        agent.settimeout(1)
        agent.connect(where)
        agent.settimeout(None)
    except OSError:
        agent.close()
        return None
    return agent


def come(waits: bool = True) -> Door:
    """A connection, waited for while the executor is being restarted. waits, and what is raised: as of Door."""
    try:
        return Door(waits)
    except Error as error:
        if error.code != "unavailable" or not os.path.isdir(os.path.dirname(path())):
            raise
    return _come_later(waits)


def _come_later(waits: bool) -> Door:
    from time import sleep

    began, told = monotonic(), False
    while True:
        sleep(0.05)
        try:
            return Door(waits)
        except Error as error:
            waited, was_there = monotonic() - began, os.path.exists(path())
            if error.code != "unavailable" or waited > (RESTART if was_there else START):
                raise
        if waited > 1 and was_there and not told:
            told = True
            output.say("The executor is not there; waiting for it to come back. (Press Ctrl+C to leave)")


def request(op: str, token: str, **fields: Any) -> dict[str, Any]:
    """The first frame of a connection. Root says for whom it asks, where that is somebody else."""
    user = config.sudo_user()
    return {"v": 1, "op": op, "token": token, "beat": True, **({"user": user} if user else {}), **fields}


def ask(op: str, token: str, limit: float = ANSWER, **fields: Any) -> dict[str, Any]:
    """One question with one answer. limit: as in `Door.answer`."""
    return next(ask_all(op, token, limit, **fields))


def ask_all(op: str, token: str, limit: float = ANSWER, **fields: Any) -> Iterator[dict[str, Any]]:
    """One question with many answers, until `{"end": true}`. limit: for each, as in `Door.answer`."""
    connection = Door()
    try:
        connection.send(request(op, token, **fields))
        while True:
            frame, _ = connection.answer(limit)
            if frame.get("end"):
                return
            yield frame
    except Away:
        raise Error("unavailable", "the executor went away before it answered", "try again") from None
    finally:
        connection.close()


def ask_descriptor(op: str, token: str, **fields: Any) -> int:
    """One question whose answer is a descriptor to read."""
    connection = Door()
    try:
        connection.send(request(op, token, **fields))
        _, fd = connection.answer()
    except Away:
        raise Error("unavailable", "the executor went away before it answered", "try again") from None
    finally:
        connection.close()
    if fd < 0:
        raise Error("internal", "the executor's answer lacks its descriptor", "report this")
    return fd
