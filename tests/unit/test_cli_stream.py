"""The session's end of a terminal, over the kinds of socket that engines use."""

from __future__ import annotations

import socket

import pytest

from beaker_sessions.cli.stream import STDOUT, Stream


def test_nothing_typed_is_no_end_of_the_input() -> None:
    """As after the first of the two detach keys, which is held back."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stream = Stream(ours.detach(), "conmon")
    assert (stream.send(b""), stream.send(b"x")) == (0, 1)
    assert theirs.recv(10) == b"x"
    theirs.close()
    stream.close()


@pytest.mark.parametrize(("kind", "framing"), [(socket.SOCK_SEQPACKET, "conmon"), (socket.SOCK_STREAM, "raw")])
def test_a_process_that_does_not_read_loses_no_output(kind: int, framing: str) -> None:
    """It ends with something typed left unread, which resets the connection."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    stream = Stream(ours.detach(), framing)
    assert stream.send(b"typed") == 5
    theirs.send(b"\2out" if framing == "conmon" else b"out")
    theirs.close()
    assert stream.receive() == [(STDOUT, b"out")]
    assert stream.receive() is None
    stream.close()
