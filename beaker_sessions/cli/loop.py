"""Waiting: one `poll` and a few named timers. Knows nothing of what is waited for."""

from __future__ import annotations

from select import POLLERR, POLLHUP, POLLIN, POLLNVAL, poll
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READABLE = POLLIN | POLLHUP | POLLERR | POLLNVAL  # the end and a failure are found by reading


class Loop:
    """Descriptors with the events wanted of them, and timers, of which each name has at most one."""

    def __init__(self) -> None:
        self._poll = poll()
        self._wanted: dict[int, int] = {}
        self._timers: dict[str, tuple[float, Callable[[], None]]] = {}

    def watch(self, fd: int, events: int) -> None:
        """Want these events of `fd` from now on; none is to forget it, because poll reports a hang-up unasked."""
        if not events:
            self.forget(fd)
        elif self._wanted.get(fd) != events:
            self._poll.register(fd, events)
            self._wanted[fd] = events

    def forget(self, fd: int) -> None:
        """To be called before `fd` is closed."""
        if self._wanted.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def after(self, seconds: float, name: str, act: Callable[[], None]) -> None:
        """Call `act` after so long, instead of what was set under this name."""
        self._timers[name] = (monotonic() + seconds, act)

    def cancel(self, *names: str) -> None:
        """Forget these timers, all without a name."""
        for name in names or list(self._timers):
            self._timers.pop(name, None)

    def is_set(self, name: str) -> bool:
        return name in self._timers

    def wait(self) -> dict[int, int]:
        """Wait for an event or the next timer: descriptor -> events."""
        timeout = None
        if self._timers:
            timeout = max(0.0, (min(when for when, _ in self._timers.values()) - monotonic()) * 1000 + 1)
        return dict(self._poll.poll(timeout))

    def run_timers(self) -> None:
        if not self._timers:
            return
        now = monotonic()
        for name, (when, act) in list(self._timers.items()):
            if when <= now and self._timers.get(name) == (when, act):  # an earlier one may have cancelled it
                del self._timers[name]
                act()
