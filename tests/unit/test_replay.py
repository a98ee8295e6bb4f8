"""What attach shows of the past makes no terminal answer, and puts a new terminal into the modes of the old one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_sessions.executor import replay

QUESTIONS = [
    b"\x1b[c", b"\x1b[0c", b"\x1b[>c", b"\x1b[=c", b"\x1b[5n", b"\x1b[6n", b"\x1b[?6n", b"\x1b[>q", b"\x1b[x",
    b"\x1b[18t", b"\x1b[14;2t", b"\x1b[?2026$p", b"\x1b[4$p", b"\x1b[?u", b"\x1b[?4m", b"\x1b[?1;1S",
    b"\x1b[1;1;1;1;1;1*y", b"\x1b[>0q",
    b"\x1bZ", b"\x05", b"\x1b]10;?\x07", b"\x1b]11;?\x1b\\", b"\x1b]4;1;?\x07", b"\x1b]52;c;?\x07", b"\x1bP$qm\x1b\\",
    b"\x1bP+q544e\x1b\\", b"\x1b_Gi=1,a=q;AAAA\x1b\\", b"\xc2\x9bc", b"\x1b[6\x07n", b"\x1b[6\nn", b"\x1b[1\x1b[6n",
    b"\x1b]11;\x18\x1b[6n", b"\x1bP\x1a\x1b[c", b"\x1b\x1b[c", b"\x1bPtmux;\x1b\x1b[c\x1b\\", b"\x1b[1$w", b"\x1b['|",
]  # fmt: skip
HARMLESS = [
    b"plain\r\n", "Käse 漢字 🙂".encode(), b"\x1b[31;1m", b"\x1b[38:2::1:2:3m", b"\x1b[2J\x1b[H", b"\x1b[10;20H",
    b"\x1b[?1049h",
    b"\x1b[?2004h", b"\x1b]0;a title\x07", b"\x1b]8;;http://x/y\x1b\\link\x1b]8;;\x1b\\", b"\x1b(0qqq\x1b(B", b"\x1bM",
    b"\x1b7\x1b8",
    b"\x1b[2 q", b"\x1b[22;0;0t", b"\x1b[>4;2m", b"\x1b[>1u", b"\x1bPq#0;2;0;0;0\x1b\\", b"\xff\xfe\x00", b"\x1b[r",
]  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_questions_are_left_out(question: bytes) -> None:
    assert not answers(replay.shown(b"", b"a" + question + b"b"))


@pytest.mark.parametrize("output", HARMLESS)
def test_all_else_stays(output: bytes) -> None:
    assert replay.shown(b"", b"a" + output + b"b") == b"a" + output + b"b"


PIECES = st.sampled_from(
    [
        *QUESTIONS,
        *HARMLESS,
        b"\x1b[3;20r",
        b"\x1b",
        b"\x1b[",
        b"\x1b]",
        b"\x1bP",
        b"\x1b\\",
        b"\x07",
        b"\x18",
        b"c",
        b"6n",
        b"?",
        b"\x9b",
        b"\xc2",
    ]
)


@given(st.lists(PIECES, max_size=12), st.integers(0, 80))
def test_no_mixture_and_no_cut_makes_a_question(pieces: list[bytes], cut: int) -> None:
    output = b"".join(pieces)
    assert not answers(replay.shown(output[:cut], output[cut:]))


def test_a_sequence_that_is_cut_off_at_the_beginning_is_left_out() -> None:
    assert replay.shown(b"before \x1b[38;5", b";1mred") == b"\x1b[38;5;1mred"  # by its modes
    assert replay.shown(b"before \x1b]0;a ti", b"tle\x07text") == b"text"
    assert replay.shown("ä".encode()[:1], "ä".encode()[1:] + b"text") == b"text"


def test_one_that_is_not_complete_at_the_end_belongs_to_what_comes() -> None:
    for part in (b"\x1b", b"\x1b[", b"\x1b[38;5", b"\x1b]0;a ti", b"\x1bP$q"):
        assert replay.shown(b"", b"text" + part) == b"text" + part


def test_modes_that_were_set_long_before() -> None:
    vim = b"\x1b[?1049h\x1b[?1h\x1b=\x1b[?2004h\x1b[?1000;1006h"
    long = b"\x1b[?25l\x1b[31mtext\x1b[0m\x1b[?25h" * 100_000
    begin = replay.shown(vim + long, b"last")
    for mode in (1, 1000, 1006, 1049, 2004):
        assert b"\x1b[?%dh" % mode in begin
    assert begin.startswith(b"\x1b[?1049h")
    assert b"\x1b=" in begin
    assert b"\x1b[?25l" not in begin
    assert begin.endswith(b"last")


def test_modes_that_were_left_again_are_not_set() -> None:
    assert replay.shown(b"\x1b[?1049h\x1b[?25l ... \x1b[?25h\x1b[?1049l", b"$ ") == b"$ "
    assert replay.shown(b"\x1b[?1049h\x1b[31m\x1bc", b"$ ") == b"$ "


def test_margins_hold_for_what_was_drawn_and_not_for_another_size() -> None:
    """As a terminal forgets them when its size changes, which is what the program is told then."""
    forget = b"\x1b7\x1b[r\x1b8"
    assert replay.shown(b"", b"\x1b[1;24rtext") == b"\x1b[1;24rtext" + forget
    assert replay.shown(b"\x1b[1;24r", b"text") == b"\x1b[1;24rtext" + forget
    assert replay.shown(b"", b"\x1b[1;24rtext\x1b[38;5") == b"\x1b[1;24rtext" + forget + b"\x1b[38;5"
    assert replay.shown(b"\x1b[1;24r", b"text\x1b[r") == b"\x1b[1;24rtext\x1b[r"


def test_a_colour_that_was_on_is_on() -> None:
    assert replay.shown(b"\x1b[0m\x1b[1m\x1b[31m", b"red") == b"\x1b[0m\x1b[1m\x1b[31mred"


# A terminal as a second opinion, byte by byte, after the state machine of Paul Williams' "A parser for DEC's
# ANSI-compatible video terminals", with C1 controls in UTF-8. It knows what it answers, and not what is harmless.


def answers(output: bytes) -> list[str]:
    """What a terminal that gets these bytes would answer to."""
    result: list[str] = []
    state, collected = "ground", ""
    text = output.decode("utf-8", "replace")
    text = re.sub("[\x80-\x9f]", lambda c: "\x1b" + chr(ord(c[0]) - 0x40), text)
    for char in text:
        if char in "\x18\x1a":
            state = "ground"
        elif char == "\x1b":
            if state == "string":
                result += _string(collected)
            state, collected = "escape", ""
        elif state == "string":
            if char == "\x07" and collected[0] == "]":
                result += _string(collected)
                state = "ground"
            else:
                collected += char
        elif char < "\x20":
            if char == "\x05":
                result.append("ENQ")
        elif state == "escape":
            if char in "]PX^_" and not collected:
                state, collected = "string", char
            elif char == "[" and not collected:
                state = "csi"
            elif char <= "\x2f":
                collected += char
            else:
                if char == "Z" and not collected:
                    result.append("DECID")
                state = "ground"
        elif state == "csi":
            collected += char
            if "\x40" <= char <= "\x7e":
                result += _csi(collected)
                state = "ground"
    return result


def _csi(sequence: str) -> list[str]:
    final, first = sequence[-1], sequence[0]
    between = "".join(c for c in sequence[:-1] if "\x20" <= c <= "\x2f")
    asks = (
        (final in "cnx" and not (final == "n" and first == ">"))
        or (final == "q" and first == ">")
        or (final == "t" and not between and sequence.partition(";")[0].rstrip("t") not in ("22", "23"))
        or (final in "umS" and first == "?")
        or (final in "pwuy" and between in ("$", "*"))
        or (final in "|w" and between == "'")
    )
    return [sequence] if asks and not (final == "x" and between) else []


def _string(collected: str) -> list[str]:
    kind, body = collected[0], collected[1:]
    asks = (
        (kind == "]" and "?" in body.split(";"))
        or (kind == "P" and "q" != body.lstrip("0123456789;")[:1] != "")
        or kind == "_"
    )
    return [collected] if asks else []
