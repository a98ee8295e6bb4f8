"""How long the answer to a wrong token waits. Owns the count of each peer's; never refuses anybody, nor a right token.

The wait is shorter than the 3 s that executors give the server: they ask for whoever comes to their door, and one who
shows them wrong tokens must not make them believe that the server is away.
"""

from __future__ import annotations

from collections import OrderedDict

STEP = 0.25  # seconds between answers, once
FREE = 4  # were given at once
MOST = 1.5  # seconds
PEERS = 4096  # that are remembered


class Failures:
    """By peer, as `gate` calls them."""

    def __init__(self) -> None:
        self._due: OrderedDict[str, float] = OrderedDict()

    def wait(self, peer: str, now: float) -> float:
        """Seconds until the answer to one more may go. now: seconds of any clock that only goes forward."""
        due = max(self._due.pop(peer, now), now) + STEP
        self._due[peer] = min(due, now + FREE * STEP + MOST)
        if len(self._due) > PEERS:
            self._due.popitem(last=False)
        return min(max(due - now - FREE * STEP, 0.0), MOST)
