"""Joining a log with a stream that already flows."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from beaker_sessions.sandbox.docker import replay

NUMBERS = b"".join(b"%d\n" % n for n in range(100_000))


def joined_text(log: list[replay.Frame], stream: list[replay.Frame]) -> tuple[bytes, bool]:
    joined, met = replay.join(log, stream)
    return b"".join(data for _, data in joined), met


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 5000))
@example(0, 0, 21)  # the log's only line is also the end of a later one
def test_nothing_twice_and_nothing_missing(start: int, seen: int, more: int) -> None:
    """The stream begins somewhere before the log's end, or right there, and goes on after it."""
    logged = NUMBERS[: NUMBERS.index(b"\n", start + seen) + 1]
    stream = NUMBERS[start : len(logged) + more]
    joined, met = joined_text([(1, logged)], [(1, stream)])
    assert (joined, met or b"\n" not in stream) == (NUMBERS[: max(len(logged), start + len(stream))], True)


def test_stream_that_reaches_further_back_than_the_log() -> None:
    joined, met = joined_text([(1, NUMBERS[5000:6000])], [(1, NUMBERS[4000:7000])])
    assert (joined, met) == (NUMBERS[5000:7000], True)


def test_late_log_is_told() -> None:
    assert joined_text([(1, b"one\n")], [(1, b"three\n")]) == (b"one\nthree\n", False)


def test_output_and_errors_are_joined_each_on_its_own() -> None:
    log = [(1, b"out 1\n"), (2, b"err 1\n"), (1, b"out 2\n")]
    stream = [(2, b"err 1\n"), (1, b"t 2\nout 3\n"), (2, b"err 2\n")]
    assert joined_text(log, stream) == (b"out 1\nerr 1\nout 2\nout 3\nerr 2\n", True)
    assert replay.join(log, stream)[0][-2:] == [(1, b"out 3\n"), (2, b"err 2\n")]


def test_cut_at_a_line() -> None:
    joined = replay.recent(NUMBERS)
    assert replay.LIMIT - 10 < len(joined) <= replay.LIMIT
    assert NUMBERS.endswith(b"\n" + joined)


def test_frames() -> None:
    frame = b"\2\0\0\0\0\0\0\3abc"
    assert replay.frames(frame * 2) == ([(2, b"abc")] * 2, 0)
    assert replay.frames(frame + frame[:3]) == ([(2, b"abc")], 5)
    assert replay.frames(frame[:-1]) == ([], 1)
