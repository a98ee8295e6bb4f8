"""Coming back to a session, in a real terminal that answers what it is asked: tmux.

The screen shows what it showed, in the new size, and nothing is typed into what runs.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator

import pytest

from tests.stack import BIN, User, wait_for

NAMES = itertools.count()
# A full-screen program that asks its terminal as vim does, and writes down every key that it gets.
FULL_SCREEN = r"""
import curses, os, sys
keys = open(os.path.expanduser("~/keys"), "ab", buffering=0)
def main(screen):
    sys.stdout.write("\033[c\033[>c\033[6n\033[>q\033]11;?\007\033P$qm\033\\\033[?2004h")
    rows, _ = screen.getmaxyx()
    sys.stdout.write(f"\033[1;{rows}r")
    while True:
        rows, columns = screen.getmaxyx()
        lines = [f"size {rows} {columns}", "drawn with care", *map(str, range(2, rows))]
        screen.refresh()
        sys.stdout.write("\033[H\033[J" + "\r\n".join(lines))
        sys.stdout.flush()
        key = screen.getch()
        if key == curses.KEY_RESIZE:
            continue
        keys.write(b"%d " % key)
        if key == ord("q"):
            return
curses.wrapper(main)
"""


class Screen:
    """A command of a user in a tmux of their own, which is a terminal of that size."""

    def __init__(self, user: User, rows: int, columns: int, *words: str) -> None:
        self.user, self.name = user, f"replay-{os.getpid()}-{next(NAMES)}"
        command = shlex.join([str(BIN / "beaker"), *words])
        size = ["-x", str(columns), "-y", str(rows)]
        self("-f", "/dev/null", "new-session", "-d", *size, f"{command}; sleep 1000")

    def __call__(self, *words: str) -> str:
        done = self.user.run("tmux", "-L", self.name, *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode()

    @property
    def text(self) -> str:
        return self("capture-pane", "-p")

    def type(self, *keys: str) -> None:
        self("send-keys", *keys)

    def close(self) -> None:
        self.user.run("tmux", "-L", self.name, "kill-server")


@pytest.fixture
def screens(ada: User) -> Iterator[list[Screen]]:
    opened: list[Screen] = []
    yield opened
    for screen in opened:
        screen.close()
    for name in ("keys", "full.py"):
        (ada.home / name).unlink(missing_ok=True)


def detach(screen: Screen) -> None:
    screen.type("C-^", "d")
    wait_for("it has detached", lambda: "Detached:" in screen.text)


def test_a_full_screen_program_is_drawn_anew_and_gets_no_keys(ada: User, screens: list[Screen]) -> None:
    program, keys = ada.home / "full.py", ada.home / "keys"
    program.write_text(FULL_SCREEN)
    first = Screen(ada, 24, 80, "session", "create", "--gpus", "0", "--name", "full", "--", "python3", "full.py")
    screens.append(first)
    wait_for("the screen", lambda: "size 24 80" in first.text)
    first.type("a")
    wait_for("the key", lambda: keys.exists() and keys.read_text().endswith("97 "))
    typed = keys.read_text()
    detach(first)
    for rows, columns in ((30, 100), (30, 100), (20, 60)):  # larger, the same, smaller
        screen = Screen(ada, rows, columns, "session", "attach", "full")
        screens.append(screen)
        wait_for("the screen again", lambda s=screen, r=rows, c=columns: f"size {r} {c}" in s.text)
        assert screen.text.splitlines()[1] == "drawn with care"
        screen.type("b")
        typed += "98 "
        wait_for("the key", lambda t=typed: len(keys.read_text()) >= len(t))  # type: ignore[misc]
        assert keys.read_text() == typed, "what the terminal answered to the past was typed"
        detach(screen)
    last = Screen(ada, 24, 80, "session", "attach", "full")
    screens.append(last)
    wait_for("the screen", lambda: "size 24 80" in last.text)
    last.type("q")
    wait_for("the end", lambda: ada.json("session", "list") == [])
    assert keys.read_text() == typed + "113 "


def test_questions_of_the_past_are_not_answered_at_the_prompt(ada: User, screens: list[Screen]) -> None:
    first = Screen(ada, 24, 80, "session", "create", "--gpus", "0", "--name", "prompt")
    screens.append(first)
    wait_for("the prompt", lambda: "$" in first.text)
    # Each asks, takes the answer, and stays in the output.
    for question in (r"\033[c", r"\033[6n", r"\033[>q", r"\033]11;?\007"):
        first.type(f"printf '{question}'; read -rsN 200 -t 1 answer; echo asked", "Enter")
        wait_for("the answer", lambda: first.text.rstrip().endswith("$"))
    first.type("printf 'a \\033[1mbold\\033[0m word\\n'", "Enter")
    wait_for("the word", lambda: "\na bold word" in first.text)
    detach(first)
    again = Screen(ada, 30, 90, "session", "attach", "prompt")
    screens.append(again)
    wait_for("what it showed", lambda: "\na bold word" in again.text)
    wait_for("the prompt", lambda: again.text.rstrip().endswith("$"))
    again.type("echo typed-nothing-else", "Enter")
    wait_for("the echo", lambda: "\ntyped-nothing-else" in again.text)
    line = next(line for line in again.text.splitlines() if "echo typed-nothing-else" in line)
    assert line.endswith("$ echo typed-nothing-else"), line
    again.type("exit", "Enter")
    wait_for("the end", lambda: ada.json("session", "list") == [])
