"""How many second processes (`session exec`) each account has on this node, so that they are not too many.

Owns the count. A process counts from before its start until it has ended, whether or not somebody follows it. So the
driver is asked only when an account seems to be at its limit, and once for each account after the executor's start.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import Error
from ..model import Session, State
from ..sandbox import Sandboxes, Terminal
from . import admission
from .sessions import Sessions


@dataclass
class _Own:
    """Of one account. running: (session, handle), None until the driver was asked. starting: on their way there."""

    running: set[tuple[str, str]] | None = None
    starting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Execs:
    def __init__(self, sessions: Sessions, sandboxes: Sandboxes) -> None:
        self.sessions, self.sandboxes = sessions, sandboxes
        self._lock = threading.Lock()
        self._accounts: dict[str, _Own] = {}

    def start(self, session: Session, act: Callable[[], tuple[str, Terminal]]) -> tuple[str, Terminal]:
        """Do `act`, which starts a process in a session, if its account may have one more. Raises Error limit."""
        limits, own = self.sessions.limits, self._own(session)
        if not limits.execs:
            return act()
        with own.lock:  # counted and taken in one step
            if own.running is None:
                own.running = self._found(session.account)
            elif own.starting + len(own.running) >= limits.execs:
                own.running = {one for one in own.running if self._runs(*one)}
            admission.may_exec(limits, own.starting + len(own.running))
            own.starting += 1
        started = None
        try:
            started = act()
            return started
        finally:
            with own.lock:
                own.starting -= 1
                if started:
                    own.running.add((session.id, started[0]))

    def ended(self, session: Session, handle: str) -> None:
        own = self._own(session)
        with own.lock:
            if own.running:
                own.running.discard((session.id, handle))

    def _own(self, session: Session) -> _Own:
        with self._lock:
            return self._accounts.setdefault(session.account, _Own())

    def _found(self, account: str) -> set[tuple[str, str]]:
        found = set()
        for one in self.sessions.live():
            if one.account == account and one.state == State.STARTED:
                try:
                    found |= {(one.id, handle) for handle in self.sandboxes.execs(one.id)}
                except Error as error:
                    if error.code != "not_found":  # it ended just now
                        raise
        return found

    def _runs(self, id: str, handle: str) -> bool:
        """What cannot be known runs."""
        try:
            return self.sandboxes.exec_running(id, handle)
        except Error as error:
            return error.code != "not_found"
