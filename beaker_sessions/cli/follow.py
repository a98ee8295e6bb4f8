"""Following a session, or a process in it, to its end: one loop over door, stream, standard streams and signals.

Owns what the user experiences between the first frame and the exit code: waiting, cancelling, copying, detaching, and
an executor that goes away and comes back. Nothing here waits for anything but `poll`: a stuck terminal, a stuck session
or a dead executor never takes the detach key away. It is one long module because all of it moves one state.
"""

from __future__ import annotations

import errno
import os
from binascii import a2b_base64
from select import POLLIN, POLLOUT

from ..errors import Error
from . import output
from .backlog import PROMPT, STUCK, Backlog
from .door import BUSY, DEAD, QUIET, Away, Door, Silence, come
from .loop import READABLE, Loop
from .stream import CHUNK, STDOUT, Stream, past
from .terminal import DetachKey, Output, Signals, Terminal, may_read, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from typing import Any

    from .progress import Progress
else:
    import _signal as signal  # `signal` is the same with an import of `enum`

PATIENCE = 60.0  # seconds that a script waits for an executor that is away or silent, when nothing else is left to do
ANSWER = 300.0  # seconds that it waits for the first answer of one that is alive
LATER = 0.1  # seconds between attempts to connect while too many others do
CANCEL = 20.0  # seconds for a cancelled session to be gone,
SAID = 1.0  # and until it is said that this takes a while
DRAIN = 2.0  # seconds without a byte, after the end was announced, until the stream counts as finished
HINT = 3.0  # seconds between the end of the stream and saying that the session itself has not ended


class Follow:
    """One followed session. `run` returns the exit code, or raises the Error that the executor answered.

    request: the first frame, of op create, attach or exec. tty: the session's terminal is shown on the user's.
    """

    def __init__(self, request: dict[str, Any], *, tty: bool, progress: Progress, id: str = "") -> None:
        self._request, self._tty, self._progress = request, tty, progress
        self._op: str = request["op"]
        self.id = id or request.get("id") or ""
        self._door: Door | None = None
        self._stream: Stream | None = None
        self._streamed = False  # there was a stream: what it carried must not come again
        self._handle = ""
        self._earlier: list[tuple[int, bytes]] = []
        self._sent = False  # the executor may have read the request
        self._silent = False  # it was said that the executor does not answer
        self._ended: dict[str, Any] | None = None
        self._result: int | None = None
        self._canceled_by = 0
        self._signals_sent = 0
        self._pause = 0.05
        self._terminal, self._keys = Terminal(), DetachKey()
        self._typed = b""  # read from standard input, not yet taken by the session
        self._input = tty or may_read()
        self._returning = False  # the executor went away, and has not said anything since
        self._failure: Error | None = None
        self._loop = Loop()

    def run(self) -> int:
        self._signals: Signals = Signals()
        self._output: Output = Output()
        self._backlog: Backlog = Backlog(self._output, self._unreadable)
        try:
            self._expect()
            self._loop.after(QUIET + SAID, "busy", self._busy)
            if not self._tty:
                self._loop.after(ANSWER, "answer", self._give_up)
            self._connect(come)
            while self._result is None:
                self._turn()
            return self._result
        except Error:
            self._break_line()
            raise
        finally:
            self._close()

    def _turn(self) -> None:
        stream, door, full = self._stream, self._door, self._backlog.fd
        self._loop.watch(self._signals.fd, POLLIN)
        if door:
            self._loop.watch(door.fileno(), POLLIN)
        if full >= 0:
            self._loop.watch(full, POLLOUT)
        if stream:
            more = POLLIN if self._backlog.has_room else 0
            self._loop.watch(stream.fileno(), more | (POLLOUT if self._typed else 0))
            if self._input:
                self._loop.watch(0, 0 if self._typed else POLLIN)
        ready = self._loop.wait()
        if self._signals.fd in ready:
            self._on_signals()
        if self._result is None and door and door.fileno() in ready:
            self._on_door(door)
        if self._result is None and full in ready:
            self._on_room()
        if self._result is None and stream and (events := ready.get(stream.fileno(), 0)):
            if events & POLLOUT:
                self._feed()
            if events & READABLE and self._backlog.has_room:
                self._on_stream(stream)
        if self._result is None and self._stream and self._input and not self._typed and 0 in ready:
            self._on_input()
        if self._result is None:
            self._loop.run_timers()

    # -- the executor

    def _on_door(self, door: Door) -> None:
        try:
            frame, fd = door.receive()
        except Away:
            self._lost()
            return
        except Silence:
            return
        except Error as error:
            if error.code == "unavailable" and (self._streamed or self._returning):
                self._lost()
            elif self._canceled_by:
                self._end({})  # however it was interrupted
            elif self._stream and error.code not in ("unauthorized", "forbidden"):
                self._failure = error  # the exit code is lost, but not the open terminal
                self._drop_door()
            else:
                raise
            return
        self._silent = False
        self._loop.cancel("give up")
        self._expect()
        if frame.get("alive"):
            return
        self._loop.cancel("away", "busy", "answer")
        self._returning, self._pause = False, 0.05
        event = frame.get("event")
        if event == "earlier":
            self._earlier = past(fd, frame["framing"])
        elif event == "created":
            self.id = frame["job"]["id"]
            self._progress.tell(frame)
            if self._canceled_by:
                door.try_send({"cancel": True})
        elif event == "terminal":
            self._begin(frame, fd)
        elif event == "ended":
            self._end(frame)
        elif event == "detached":
            self._result = 0
        elif event == "read_on":
            self._read_on(door)
        elif event == "notice":
            self._notice(frame["text"])
        elif not self._streamed:
            self._progress.tell(frame)

    def _read_on(self, door: Door) -> None:
        """The session waits for us: say that we are there, and do not wait for a terminal that takes nothing."""
        door.try_send({"reading": True})
        if self._tty and self._backlog.waits(PROMPT):
            self._backlog.skip()

    def _notice(self, text: str) -> None:
        """Something to know about the session, as it runs: told where its output is seen, and nowhere else."""
        text = f"beaker: {output.escape(text)}"
        if self._tty and self._stream:
            self._show([(STDOUT, f"\r\n[{text}]\r\n".encode())])
            self._repaint()
        else:
            self._progress.say(text)

    def _connect(self, to: Callable[..., Door]) -> None:
        """To the executor, and say what is wanted. Raises Error unavailable when none is there."""
        try:
            self._door = to(waits=False)
        except Silence:  # others are before us
            self._loop.after(LATER, "again", self._again)
            return
        try:
            self._door.send(self._resumption(), agent=True)
        except Away:  # nothing of it has arrived
            self._lost()
            return
        self._sent = True

    def _lost(self) -> None:
        """The executor closed the connection before the end: come back to it, while the terminal goes on."""
        self._drop_door()
        if self._op == "exec" and self._sent and not self._handle:
            raise self._uncertain("went away")  # and it must not be started twice
        self._loop.cancel("quiet")
        if not self._stream:
            away = "The executor went away; waiting for it to come back. (Press Ctrl+C to leave)"
            if not self._returning:
                self._loop.after(SAID, "away", lambda: self._progress.say(away))
            self._limit()
        self._returning = True
        self._loop.after(self._pause, "again", self._again)
        self._pause = min(self._pause * 2, 2.0)

    def _again(self) -> None:
        try:
            self._connect(Door)
        except Error:
            self._lost()
            return
        self._earlier = []  # comes again
        if self._door:
            self._expect()
            if self._tty and self._sent:
                self._resize()

    def _resumption(self) -> dict[str, Any]:
        frame = {key: value for key, value in self._request.items() if key in ("v", "token", "user", "beat", "detach")}
        if self._op == "exec" and self._handle:
            return {**frame, "op": "exec_exit", "id": self.id or None, "handle": self._handle}
        if self._op == "exec" or not self.id or not self._sent:
            return self._request  # which was not read, or has the same idempotency key: no second session
        whole = self._op == "create"  # an attach asks for the latest output
        how = {"size": size(), "replay": True, "stream": not self._streamed, "whole": whole}
        return {**frame, "op": "attach", "id": self.id, **how}

    def _expect(self) -> None:
        """A sign of life is due from the executor, where nothing else is left to wait for."""
        if self._stream:
            self._loop.cancel("quiet")
        else:
            self._loop.after(QUIET, "quiet", self._quiet)

    def _quiet(self) -> None:
        if not self._silent:
            self._silent = True
            self._progress.say(DEAD)
        self._limit()

    def _busy(self) -> None:
        if not self._silent:
            self._progress.say(BUSY)

    def _limit(self) -> None:
        """A script has to end at some time; a person sees what is waited for, and has Ctrl-C."""
        if not self._tty and not self._loop.is_set("give up"):
            self._loop.after(PATIENCE, "give up", self._give_up)

    def _uncertain(self, what: str) -> Error:
        where = f" {self.id}" if self.id else ""
        return Error(
            "unavailable",
            f"the executor {what} before it said whether the command was started: it may have run",
            f"before you run it again, look with: beaker session exec{where} -- ps -ef",
        )

    def _give_up(self) -> None:
        if self._op == "exec" and self._sent and not self._handle:
            raise self._uncertain("did not answer")
        known = f"session {self.id} goes on; come back with: beaker session attach {self.id}"
        hint = known if self.id else "whether it started is shown by: beaker session list"
        raise Error("unavailable", "the executor of this machine does not answer", hint)

    def _drop_door(self) -> None:
        if self._door:
            self._loop.forget(self._door.fileno())
            self._door.close()
            self._door = None

    # -- begin and end

    def _begin(self, frame: dict[str, Any], fd: int) -> None:
        if self._canceled_by or self._stream:
            os.close(fd)
            return
        self._stream, self._streamed = Stream(fd, frame["framing"]), True
        self._expect()
        self._handle = frame.get("handle") or ""
        self._progress.finish()
        if self._tty:
            self._terminal.raw()
            self._resize()
        if frame.get("replay"):
            self._show([(STDOUT, a2b_base64(frame["replay"]))])
        self._show_earlier()
        if not self._input:
            self._stream.half_close()

    def _show_earlier(self) -> None:
        """What the session wrote before there was a stream, or instead of one when it has ended."""
        if self._earlier:
            self._streamed = True
            self._progress.finish()
            self._show(self._earlier)
            self._earlier = []

    def _end(self, frame: dict[str, Any]) -> None:
        self._ended = frame
        self._drop_door()
        self._show_earlier()
        self._loop.cancel()
        if self._stream or not self._backlog.has_room:
            self._loop.after(DRAIN, "drain", self._finish)
        else:
            self._finish()

    def _finish(self) -> None:
        assert self._ended is not None
        if not self._backlog.has_room:  # a pager that takes its time must not lose the end
            self._loop.after(DRAIN, "drain", self._finish)
            self._flush()
        else:
            self._result = self._conclude(self._ended)

    def _conclude(self, frame: dict[str, Any]) -> int:
        """The exit code for the end that was announced, saying what needs to be said."""
        self._restore()
        code, message = frame.get("exitCode"), frame.get("message") or ""
        if STDOUT in self._backlog.unread:
            return 128 + signal.SIGPIPE
        if self._canceled_by:
            self._progress.say(f"Canceled: session {self.id} has given up its place." if self.id else "Canceled.")
            return 128 + self._canceled_by
        if self._request.get("detach") and code is not None:
            return 0  # it has run, and ended already
        if code is None:
            output.say(f"beaker: session {self.id} did not run: {message or 'it was stopped'}")
            return 128 + signal.SIGTERM
        if message:
            self._break_line()
            output.say(f"beaker: session {self.id} ended: {message}")
        return int(code)

    def _leave(self, code: int) -> None:
        """Detach: the session goes on, and the user is told how to come back."""
        self._break_line()
        if self._op == "exec" and self._sent and not self._streamed:
            what = "the executor had not said yet whether the command was started: it may have run"
            output.say(f"beaker: {what}")
        elif self.id and self._op != "exec":
            self._progress.say(f"Detached: session {self.id} goes on. Come back with: beaker session attach {self.id}")
        self._result = code

    def _break_line(self) -> None:
        self._restore()
        if self._tty and self._streamed:
            output.say("")  # the cursor is where the session left it

    def _restore(self) -> None:
        self._terminal.restore(self._output)

    def _close(self) -> None:
        self._restore()
        self._drop_door()
        if self._stream:
            self._stream.close()
        self._progress.finish()
        self._output.close()
        self._signals.close()

    # -- bytes

    def _on_stream(self, stream: Stream) -> None:
        pieces = stream.receive()
        if pieces is None:
            self._loop.forget(stream.fileno())
            self._loop.forget(0)
            stream.close()
            self._stream, self._typed = None, b""
            self._drained()
        elif pieces:
            if self._ended:
                self._loop.after(DRAIN, "drain", self._finish)
            self._show(pieces)

    def _drained(self) -> None:
        """The stream is at its end and all of it was written."""
        if self._ended:
            self._finish()
            return
        if self._failure:
            raise self._failure
        self._restore()  # Ctrl-C works again
        waiting = "Its output has ended; waiting for it to end. (Press Ctrl+C to leave it running)"
        self._loop.after(HINT, "hint", lambda: self._progress.say(waiting))
        if self._door:
            self._expect()
        else:
            self._limit()

    def _show(self, pieces: list[tuple[int, bytes]]) -> None:
        for _, data in pieces if self._tty else ():
            self._terminal.watch(data)
        self._backlog.put(pieces)
        self._flush()

    def _on_room(self) -> None:
        if self._backlog.resume():
            self._repaint()
        self._flush()

    def _flush(self) -> None:
        full = self._backlog.fd
        if self._backlog.flush():
            self._loop.cancel("stuck")
        if self._backlog.fd != full and full >= 0:
            self._loop.forget(full)
        if not self._backlog.has_room:
            if self._tty and not self._loop.is_set("stuck"):
                self._loop.after(STUCK, "stuck", self._backlog.skip)
        elif not self._stream and self._result is None and self._streamed:
            self._drained()

    def _unreadable(self, stream: int, error: OSError) -> None:
        """Nobody reads this stream any more, as after `| head -1`, or it cannot be written."""
        self._loop.forget(self._output.fd(stream))
        if self._tty:
            self._leave(128 + signal.SIGHUP)
        elif error.errno != errno.EPIPE:
            hint = f"session {self.id} goes on; end it with: beaker session stop {self.id}"
            raise Error("storage_full", f"cannot write the session's output: {error.strerror}", hint)
        elif stream == STDOUT and self._op == "create" and self._door:
            # The session gets what a program in a shell's pipeline would get.
            self._door.try_send({"signal": int(signal.SIGPIPE)})
            self._loop.after(DRAIN, "unread", lambda: self._leave(128 + signal.SIGPIPE))
        elif stream == STDOUT:
            self._result = 128 + signal.SIGPIPE

    def _on_input(self) -> None:
        assert self._stream
        try:
            data = os.read(0, CHUNK)
        except OSError:
            data = b""
        if not data:
            if self._tty:  # the terminal has hung up
                self._leave(128 + signal.SIGHUP)
                return
            self._input = False
            self._loop.forget(0)
            self._stream.half_close()
            return
        if self._tty:
            data, detached = self._keys.feed(data)
            if detached:
                self._stream.send(data)
                self._leave(0)
                return
        self._typed = data
        self._feed()

    def _feed(self) -> None:
        assert self._stream
        self._typed = self._typed[self._stream.send(self._typed) :]

    # -- signals

    def _on_signals(self) -> None:
        numbers = self._signals.read()
        if self._tty and self._stream:
            if signal.SIGCONT in numbers:
                self._terminal.raw()  # the shell may have changed it meanwhile
            if numbers & {signal.SIGWINCH, signal.SIGCONT}:
                self._resize()
        if signal.SIGHUP in numbers:
            self._leave(128 + signal.SIGHUP)
        for number in sorted(numbers & {signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}):
            if self._result is None:
                self._interrupted(int(number))

    def _interrupted(self, number: int) -> None:
        if self._op == "create" and not self._streamed:
            again, self._canceled_by = self._canceled_by, self._canceled_by or number
            self._progress.finish()
            told = self._door is not None and (bool(again) or self._door.try_send({"cancel": True}))
            if again or not told or self._silent:
                self._abandon(told)
                return
            until = f"Canceling session {self.id}... (Press Ctrl+C again to leave it)" if self.id else "Canceling..."
            self._loop.after(SAID, "canceling", lambda: self._progress.say(until))
            self._loop.after(CANCEL, "cancel", lambda: self._abandon(True))
            return
        self._signals_sent += 1
        forwards = self._stream and not self._tty and self._op == "create" and self._signals_sent < 3
        if not (forwards and self._door and self._door.try_send({"signal": number})):
            self._leave(128 + number)

    def _abandon(self, told: bool) -> None:
        """Leave a session that is not wanted any more. told: the executor hears of that, sooner or later."""
        self._break_line()
        if self.id and told:
            self._progress.say(f"Canceled: session {self.id} ends as soon as the executor gets to it.")
        elif self.id:
            stop = f"beaker session stop {self.id}"
            self._progress.say(f"The executor is away: session {self.id} goes on. When it is back, end it with: {stop}")
        elif self._sent and not told:
            self._progress.say("The executor is away; whether the session was made is shown by: beaker session list")
        self._result = 128 + self._canceled_by

    def _repaint(self) -> None:
        """Have a full-screen program draw again what was written over: it does so for another size."""
        if (now := size()) and self._door:
            self._door.try_send({"resize": [now[0] + 1, now[1]]})
            self._resize()

    def _resize(self) -> None:
        """Tell the size; an executor that takes nothing now is told a little later."""
        now = size()
        if now and self._door and not self._door.try_send({"resize": now}):
            self._loop.after(0.5, "resize", self._resize)
