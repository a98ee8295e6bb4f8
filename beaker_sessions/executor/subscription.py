"""Someone who follows a session: what they are woken for, and the terminal that waits for them. Knows no session."""

from __future__ import annotations

import os
from collections.abc import Callable

from ..sandbox import Terminal


class Subscription:
    """Someone who follows a session. `news` is set, and `wake` called, when there is something new in `Sessions.view`.

    wake: called in any thread, with a lock held. wants_terminal: it asks for the main process's streams, before the
    first byte of output if it comes early enough. terminal: what it was given; whoever takes it owns its descriptor.
    """

    def __init__(self, wake: Callable[[], None], wants_terminal: bool, size: tuple[int, int] | None) -> None:
        self.news, self._wake = False, wake
        self.wants_terminal = wants_terminal
        self.size = size
        self.terminal: Terminal | None = None

    def notify(self) -> None:
        if not self.news:
            self.news = True
            self._wake()

    def close(self) -> None:
        if self.terminal:
            os.close(self.terminal.fd)
