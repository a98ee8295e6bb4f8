"""The session's end of the terminal: the descriptor that came through the door, whose bytes no service of ours touches.

Owns the three framings of `sandbox.Framing`. Never waits: both directions say how far they got.
"""

from __future__ import annotations

from _socket import MSG_DONTWAIT, MSG_NOSIGNAL, SHUT_WR, socket

CHUNK = 128 << 10  # bytes read at once
PACKET = 32 << 10  # conmon reads no larger packet
STDOUT, STDERR = 1, 2


class Stream:
    """An open connection to a process's standard streams; owns `fd`, which is a socket with every engine."""

    def __init__(self, fd: int, framing: str) -> None:
        self._socket = socket(fileno=fd)
        self._parse = {"raw": _raw, "conmon": _conmon, "multiplexed": Multiplexed().feed}[framing]

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> list[tuple[int, bytes]] | None:
        """What the session wrote, as (1 or 2, bytes); [] when that is not complete yet, None at the end."""
        try:
            try:
                data = self._socket.recv(CHUNK, MSG_DONTWAIT)
            except ConnectionResetError:
                # A process that ended without reading all that was typed. The kernel tells this first, and what had
                # arrived before only to who asks again.
                data = self._socket.recv(CHUNK, MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._parse(data) if data else None

    def send(self, data: bytes) -> int:
        """How many bytes of what the user typed were taken. The end of the process is seen by `receive`, not here."""
        if not data:
            return 0  # an empty packet would be the end of the input
        try:
            return self._socket.send(data[:PACKET], MSG_DONTWAIT | MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def half_close(self) -> None:
        """The end of standard input."""
        try:
            self._socket.shutdown(SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        self._socket.close()


def _raw(data: bytes) -> list[tuple[int, bytes]]:
    return [(STDOUT, data)]


def _conmon(packet: bytes) -> list[tuple[int, bytes]]:
    return [(STDERR if packet[0] == 3 else STDOUT, packet[1:])]


def past(fd: int, framing: str) -> list[tuple[int, bytes]]:
    """What a session wrote, as of `Stream.receive`, from a file. Closes it."""
    parse = _raw if framing == "raw" else Multiplexed().feed
    pieces: list[tuple[int, bytes]] = []
    with open(fd, "rb", buffering=0) as file:
        while data := file.read(CHUNK):
            pieces += parse(data)
    return pieces


class Multiplexed:
    """Docker's frames: a byte for the stream, three zeros, a big-endian length of four bytes, then so many bytes.

    https://docs.docker.com/engine/api/v1.41/#tag/Container/operation/ContainerAttach
    """

    def __init__(self) -> None:
        self._header = b""
        self._stream, self._left = STDOUT, 0

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        pieces = []
        at = 0
        while at < len(data):
            if not self._left:
                taken = data[at : at + 8 - len(self._header)]
                self._header += taken
                at += len(taken)
                if len(self._header) == 8:
                    self._stream = STDERR if self._header[0] == 2 else STDOUT
                    self._left = int.from_bytes(self._header[4:], "big")
                    self._header = b""
                continue
            piece = data[at : at + self._left]
            pieces.append((self._stream, piece))
            self._left -= len(piece)
            at += len(piece)
        return pieces
