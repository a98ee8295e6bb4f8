"""Whose requests are at work, and whose wait for a turn, in the order in which they came.

One account's requests would otherwise take all threads, and with them Python's lock, which the answers to executors
need too. An executor that waits for seconds believes that the server is away.
"""

from __future__ import annotations

from asyncio import Semaphore
from contextlib import AsyncExitStack
from weakref import WeakValueDictionary

EACH = 2  # requests of one account, or of one peer; of four, an executor waited for twice as many
ALL = 12  # of all together: more threads make nothing faster, and executors' requests slower


class Turns:
    """who: any name, "" for who never waits. A turn lasts until its stack is closed."""

    def __init__(self) -> None:
        self._each: WeakValueDictionary[str, Semaphore] = WeakValueDictionary()
        self._all = Semaphore(ALL)

    async def own(self, turn: AsyncExitStack, who: str) -> None:
        """Wait for the others of the same name."""
        if who:
            own = self._each.get(who) or Semaphore(EACH)
            self._each[who] = own
            await turn.enter_async_context(own)

    async def among_all(self, turn: AsyncExitStack, who: str) -> None:
        """And for everybody else's too."""
        await self.own(turn, who)
        if who:
            await turn.enter_async_context(self._all)
