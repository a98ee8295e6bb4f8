"""The executor's one event loop, and the workers that do what blocks.

Owns the thread that serves every socket, and a number of threads that is fixed at the start: no caller, however many
there are, costs another. Knows no sessions and no frames. Nothing that blocks may be called in the loop: a lock that is
held while a disk is written, a driver, the server, the directory of users.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, ParamSpec, TypeVar

from .passing import Passing

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger(__name__)

STILL = 30  # seconds in which the loop does nothing, after which the process ends
ROOT = 0  # the key of the machine's root, for whom some workers are kept


class Workers:
    """threads: as many jobs at once, in all. share: as many at once for one key, which is a user or a session.

    Keys take turns, so that one with many jobs makes itself wait, and nobody else. kept: threads that only root's jobs
    get. All threads are made here; raises RuntimeError where the machine has none left. rest: seconds after which one
    without a job ends; then they are made when there are jobs.
    """

    def __init__(self, name: str, threads: int, share: int, kept: int = 0, rest: float | None = None) -> None:
        self._name, self._threads, self._rest = name, threads, rest
        self._share, self._room = share, threads - kept
        self._made = self._resting = 0
        self._waiting: dict[Hashable, deque[Callable[[], None]]] = {}  # whose turn is next, first
        self._running: Counter[Hashable] = Counter()
        self._changed = threading.Condition()
        while rest is None and self._made < threads:
            self._make()

    def submit(self, key: Hashable, act: Callable[[], None]) -> None:
        """Have `act` called in a worker. It must not raise. Raises RuntimeError where no thread can be made for it."""
        with self._changed:
            self._waiting.setdefault(key, deque()).append(act)
            waiting = sum(map(len, self._waiting.values()))
            if self._made < self._threads and self._resting < waiting and self._next() is not None:
                try:
                    self._make()
                except RuntimeError:
                    if not self._made:
                        self._waiting.clear()  # there was no other, which one of these would have taken
                        raise
            self._changed.notify()

    def _make(self) -> None:
        threading.Thread(target=self._work, name=f"{self._name} {self._made}", daemon=True).start()
        self._made += 1

    def _work(self) -> None:
        while True:
            with self._changed:
                while (key := self._next()) is None:
                    self._resting += 1
                    woken = self._changed.wait(self._rest)
                    self._resting -= 1
                    if not woken and self._next() is None:
                        self._made -= 1
                        return
                queue = self._waiting.pop(key)
                act = queue.popleft()
                if queue:
                    self._waiting[key] = queue  # behind the others
                self._running[key] += 1
            try:
                act()
            finally:
                del act  # or what it holds would stay until the next
                with self._changed:  # whoever may go on now is taken by this thread, as none was woken for them
                    self._running[key] -= 1
                    if not self._running[key]:
                        del self._running[key]

    def _next(self) -> Hashable | None:
        others = self._running.total() - self._running[ROOT]
        for key in self._waiting:
            if self._running[key] < self._share and (key == ROOT or others < self._room):
                return key
        return None


class Loop:
    """Made, then started: until then what is asked of it waits."""

    def __init__(self) -> None:
        self.asyncio = asyncio.new_event_loop()
        self.failure: BaseException | None = None  # why it has ended
        self._tasks: set[asyncio.Task[None]] = set()
        self.passing = Passing(self)
        self._beat = threading.Event()
        # A descriptor of its own for these: asyncio would also wake for output that waits, which is not ours to read.
        self._hangups, self._hung = select.epoll(), dict[int, Callable[[], None]]()
        self.asyncio.add_reader(self._hangups.fileno(), self._on_hangups)

    def start(self) -> None:
        threading.Thread(target=self._run, name="loop", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        """End the process when the loop stands still, since nobody is served then; whoever started it starts it again.

        Looks are counted, not seconds: a process that was stopped for a while may go on.
        """
        silent = 0
        while silent < STILL:
            self._beat.clear()
            try:
                self.asyncio.call_soon_threadsafe(self._beat.set)
            except RuntimeError:
                return  # it was closed, which only tests do
            time.sleep(1.0)  # not only until the beat: this thread would do nothing else
            silent = 0 if self._beat.is_set() else silent + 1
        log.critical("the loop has stood still for %d s, and the executor ends", STILL)
        os._exit(1)

    def _run(self) -> None:
        asyncio.set_event_loop(self.asyncio)
        try:
            self.asyncio.run_forever()
        except BaseException as error:
            self.failure = self.failure or error
        # Nobody is served any more, so the process ends: `main` waits for this signal.
        log.critical("the executor serves nobody any more, and ends: %r", self.failure)
        os.kill(os.getpid(), signal.SIGTERM)

    def fail(self, error: BaseException) -> None:
        """End the loop, and with it the process. In the loop."""
        self.failure = error
        self.asyncio.stop()

    def soon(self, act: Callable[..., object], *args: Any) -> None:
        """Have `act` called in the loop. From any thread."""
        self.asyncio.call_soon_threadsafe(act, *args)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine. In the loop. What it raises is logged."""
        task = self.asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("a conversation failed", exc_info=error)

    async def work(
        self, workers: Workers, key: Hashable, act: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call `act` in a worker: what it returns or raises. It goes on even if nobody waits for it any more."""
        answer: asyncio.Future[T] = self.asyncio.create_future()

        def tell(act: Callable[..., None], what: object) -> None:
            if not answer.done():  # else nobody waits any more
                act(what)

        def run() -> None:
            try:
                result = act(*args, **kwargs)
            except BaseException as error:
                self.soon(tell, answer.set_exception, error)
            else:
                self.soon(tell, answer.set_result, result)

        workers.submit(key, run)
        return await answer

    async def ready(self, fd: int, seconds: float | None = None, *, to_write: bool = False) -> None:
        """Wait until a descriptor can be read, or written. At most one waits for each. Raises TimeoutError."""
        answer: asyncio.Future[None] = self.asyncio.create_future()

        def now() -> None:
            if not answer.done():
                answer.set_result(None)

        add, remove = self.asyncio.add_reader, self.asyncio.remove_reader
        if to_write:
            add, remove = self.asyncio.add_writer, self.asyncio.remove_writer
        add(fd, now)
        try:
            async with asyncio.timeout(seconds):
                await answer
        finally:
            remove(fd)

    def on_hangup(self, fd: int, act: Callable[[], None]) -> None:
        """Call `act` once, when the other side of a stream that others read has closed it. In the loop."""
        self._hung[fd] = act
        self._hangups.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)

    def forget_hangup(self, fd: int) -> None:
        """To be called before the descriptor is closed, which others may keep open. In the loop."""
        if self._hung.pop(fd, None):
            with contextlib.suppress(OSError):
                self._hangups.unregister(fd)

    def _on_hangups(self) -> None:
        for fd, _ in self._hangups.poll(0):
            if act := self._hung.get(fd):
                act()
