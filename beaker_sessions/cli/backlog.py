"""Output of the session that the standard streams have not taken yet.

Owns when the session must wait for whoever reads, and when not: a pipe gets every byte, however long its reader takes;
a terminal that takes nothing for long is one whose connection is dead, and must not hold up what runs in the session.
"""

from __future__ import annotations

from time import monotonic

from .terminal import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

STUCK = 30.0  # seconds without a byte taken after which a terminal counts as stuck,
PROMPT = 1.0  # and when it holds up others


class Backlog:
    """unreadable(stream, error): nobody reads that stream any more, or it cannot be written."""

    def __init__(self, output: Output, unreadable: Callable[[int, OSError], None]) -> None:
        self._output, self._unreadable = output, unreadable
        self._pieces: list[tuple[int, memoryview]] = []
        self._skipped = -1  # bytes dropped since the terminal was found stuck, -1 when it is not
        self._taken = monotonic()  # when something was taken last
        self.unread: set[int] = set()  # of standard output and error, those that nobody reads any more

    @property
    def fd(self) -> int:
        """The descriptor to wait for until it takes more, -1 when nothing waits."""
        if self._pieces:
            return self._output.fd(self._pieces[0][0])
        return self._output.fd(1) if self._skipped >= 0 else -1

    @property
    def has_room(self) -> bool:
        """Whether more may be read from the session."""
        return not self._pieces

    def put(self, pieces: list[tuple[int, bytes]]) -> None:
        for stream, data in pieces:
            if self._skipped >= 0:
                self._skipped += len(data)
            elif stream not in self.unread:
                self._pieces.append((stream, memoryview(data)))

    def flush(self) -> bool:
        """Write what can be written now. Whether anything was."""
        taken = 0
        while self._pieces:
            stream, data = self._pieces[0]
            try:
                written = self._output.write(stream, data)
            except OSError as error:
                self.unread.add(stream)
                self._pieces = [piece for piece in self._pieces if piece[0] != stream]
                self._unreadable(stream, error)
                continue
            taken += written
            self._taken = monotonic() if written else self._taken
            if written < len(data):
                self._pieces[0] = (stream, data[written:])
                break
            del self._pieces[0]
        return taken > 0

    def waits(self, seconds: float) -> bool:
        """Whether something has waited for so long without anything being taken."""
        return bool(self._pieces) and monotonic() - self._taken >= seconds

    def skip(self) -> None:
        """The terminal is stuck: drop what waits and what comes, until it takes something again."""
        self._skipped = max(self._skipped, 0) + sum(len(data) for _, data in self._pieces)
        self._pieces.clear()

    def resume(self) -> bool:
        """The terminal takes something again: say what it did not show. False when it was not stuck."""
        if self._skipped < 0:
            return False
        # CAN ends an escape sequence of which only the beginning was shown.
        note = f"\x18\r\n[beaker: {self._skipped} bytes of output are not shown, as this terminal was stuck]\r\n"
        self._skipped = -1
        self.put([(1, note.encode())])
        return True
