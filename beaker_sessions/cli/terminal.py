"""The user's own terminal: raw mode and back, its size, the detach key, signals to poll for, output without waiting.

Owns the standard streams while a session uses them. Must know nothing of sessions or of the door. Whatever happens
short of SIGKILL, `Terminal.restore` runs and leaves the terminal as it was found.
"""

from __future__ import annotations

import errno
import os
import stat
import termios

from ..errors import Error

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from typing import Any
else:
    import _signal as signal  # `signal` is the same with an import of `enum`

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGWINCH, signal.SIGCONT)
ESCAPE, DETACH = b"\x1e", b"d"  # Ctrl-^, which readline, Bash, Emacs mode, tmux and screen leave alone


def is_terminal() -> bool:
    """Whether a session should have a terminal: only if someone types and someone reads."""
    return os.isatty(0) and os.isatty(1)


def may_read() -> bool:
    """Whether standard input is ours to read: a background job that reads from its terminal is stopped."""
    try:
        return not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp()
    except OSError:  # a terminal, but not the controlling one
        return True


def size() -> list[int] | None:
    """[rows, columns] of the user's terminal, None when standard output is none or does not know."""
    try:
        columns, rows = os.get_terminal_size(1)
    except OSError:
        return None
    return [rows, columns] if rows and columns else None


class Signals:
    """Signals as bytes on a descriptor, for a loop that polls: each is its own number."""

    def __init__(self) -> None:
        self.fd, self._end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._end, warn_on_full_buffer=False)

    def read(self) -> set[int]:
        try:
            return set(os.read(self.fd, 4096))
        except BlockingIOError:
            return set()

    def close(self) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        os.close(self.fd)
        os.close(self._end)


class Terminal:
    """Raw mode of the terminal on standard input, and what full-screen programs switched on in it."""

    def __init__(self) -> None:
        self._saved: list[Any] | None = None
        self._modes: set[bytes] = set()

    def raw(self) -> None:
        """Every key becomes a byte for the session: no echo, no signals, no translation. Repeating it is harmless."""
        try:
            saved = termios.tcgetattr(0)
            if self._saved is None:
                self._saved = saved
            # cfmakeraw of termios(3); what was typed ahead stays (TCSANOW, not TCSAFLUSH).
            iflag, oflag, cflag, lflag, ispeed, ospeed, cc = list(saved)
            iflag &= ~(
                termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
                | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
            )  # fmt: skip
            lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
            cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
            cc = list(cc)
            cc[termios.VMIN], cc[termios.VTIME] = 1, 0
            _set(0, [iflag, oflag & ~termios.OPOST, cflag, lflag, ispeed, ospeed, cc])
        except termios.error as error:
            raise Error(
                "unavailable", f"cannot use this terminal: {error.args[-1]}", "is it still connected?"
            ) from None

    def watch(self, data: bytes) -> None:
        """Note the private modes that `data`, output of the session, switches on and off."""
        start = data.find(b"\x1b[?")
        while start >= 0:
            end = start + 3
            while end < len(data) and data[end] in b"0123456789;":
                end += 1
            for mode in data[start + 3 : end].split(b";"):
                if mode in _UNDONE and data[end : end + 1] in (b"h", b"l"):
                    changed = (data[end : end + 1] == b"h") != (mode == b"25")  # a hidden cursor is what needs undoing
                    (self._modes.add if changed else self._modes.discard)(mode)
            start = data.find(b"\x1b[?", end)

    def restore(self, output: Output) -> None:
        """Leave raw mode, and undo what programs left on: alternate screen, mouse, bracketed paste, a hidden cursor."""
        if self._saved is None:
            return
        # First CAN, as a sequence of which only the beginning was shown would take what is said next for its rest.
        undo = b"".join(b"\x1b[?" + mode + (b"h" if mode == b"25" else b"l") for mode in sorted(self._modes))
        try:
            output.write(1, memoryview(b"\x18" + (undo and undo + b"\x1b[0m")))
        except OSError:
            pass
        self._modes.clear()
        try:
            _set(0, self._saved)
        except termios.error:
            pass  # it has hung up: nothing is left to restore
        self._saved = None


def _set(fd: int, attributes: list[Any]) -> None:
    """Set a terminal's attributes. A signal, as of being stopped in the background, interrupts that: then again."""
    while True:
        try:
            termios.tcsetattr(fd, termios.TCSANOW, attributes)
            return
        except termios.error as error:
            if error.args[0] != errno.EINTR:
                raise


# https://invisible-island.net/xterm/ctlseqs/ctlseqs.html, "DEC Private Mode Set"
_UNDONE = {b"%d" % mode for mode in (1, 9, 25, 47, 1000, 1002, 1003, 1004, 1005, 1006, 1015, 1047, 1049, 2004)}


class DetachKey:
    """Finds the detach key, Ctrl-^ then d, in what the user types. Ctrl-^ twice sends one Ctrl-^."""

    def __init__(self) -> None:
        self._armed = False

    def feed(self, data: bytes) -> tuple[bytes, bool]:
        """What to send on, and whether the user detached; what was typed after that is not sent."""
        if not self._armed and ESCAPE not in data:
            return data, False
        send = bytearray()
        for at in range(len(data)):
            byte = data[at : at + 1]
            if not self._armed:
                if byte == ESCAPE:
                    self._armed = True
                else:
                    send += byte
                continue
            self._armed = False
            if byte == DETACH:
                return bytes(send), True
            send += byte if byte == ESCAPE else ESCAPE + byte
        return bytes(send), False


class Output:
    """Standard output (1) and standard error (2), written without waiting for whoever reads them."""

    def __init__(self) -> None:
        self._fds = {stream: _reopen(stream) for stream in (1, 2)}

    def fd(self, stream: int) -> int:
        return self._fds[stream][0]

    def write(self, stream: int, data: memoryview) -> int:
        """How many bytes were taken, perhaps 0. Raises BrokenPipeError when nobody reads any more."""
        fd, most = self._fds[stream]
        try:
            return os.write(fd, data[:most] if most else data)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        for stream, (fd, _) in self._fds.items():
            if fd != stream:
                os.close(fd)


def _reopen(fd: int) -> tuple[int, int]:
    """A descriptor to write to, and how much at once (0: anything).

    O_NONBLOCK belongs to the open file, which the shell and others share, so a terminal or pipe is opened anew. Where
    that is not allowed, small writes after a poll wait hardly ever: POLLOUT of a pipe promises 4096 (pipe(7)).
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return fd, 0
    if os.isatty(fd) or stat.S_ISFIFO(mode):
        try:
            return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), 0
        except OSError:
            pass
    return fd, 4096


def ask_secret(prompt: str) -> str | None:
    """A line typed without echo on the controlling terminal; None when there is none, or at its end of input."""
    try:
        fd = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
    saved = termios.tcgetattr(fd)
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    try:
        silent = list(saved)
        silent[3] &= ~termios.ECHO
        termios.tcsetattr(fd, termios.TCSAFLUSH, silent)
        os.write(fd, prompt.encode())
        line = os.read(fd, 4096)
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, saved)
        os.write(fd, b"\n")
        os.close(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
    return line.decode(errors="replace").strip() if line else None


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt
