"""Recent output joined with a stream that is already flowing, without a gap or a repetition.

Owns: Docker's multiplexed framing (Engine API, `ContainerAttach`, "stream format") and the search for the place where
log and stream meet. Pure, but for `delivered`, which reads what has already arrived.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterable

LIMIT = 64 << 10  # bytes of recent output that an attach shows
NEEDLE = 256
QUIET, PATIENCE = 0.005, 0.05  # seconds without data, and in all, after which everything older has arrived

Frame = tuple[int, bytes]  # 1 for standard output (or a terminal), 2 for errors


def frames(data: bytes) -> tuple[list[Frame], int]:
    """The whole frames in multiplexed data, and how many bytes are missing of the one that is cut off (0: none)."""
    result: list[Frame] = []
    at = 0
    while at < len(data):
        if len(data) - at < 8:
            return result, 8 - (len(data) - at)
        stream, length = struct.unpack_from(">BxxxL", data, at)
        if len(data) - at - 8 < length:
            return result, length - (len(data) - at - 8)
        result.append((stream, data[at + 8 : at + 8 + length]))
        at += 8 + length
    return result, 0


def delivered(sock: socket.socket, tty: bool) -> list[Frame]:
    """What a just opened stream has delivered so far, up to the end of a frame."""
    data, deadline = b"", time.monotonic() + PATIENCE
    while time.monotonic() < deadline and select.select([sock], [], [], QUIET)[0]:
        chunk = sock.recv(1 << 20)
        if not chunk:
            break
        data += chunk
    if tty:
        return [(1, data)] if data else []
    while missing := frames(data)[1]:
        if not (chunk := sock.recv(missing)):
            break
        data += chunk
    return frames(data)[0]


def join(log: Iterable[Frame], stream: Iterable[Frame]) -> tuple[list[Frame], bool]:
    """The log and what the stream adds to it.

    The flag says whether they met: when whole lines of the stream are not in the log, the log is late and should be
    read again.
    """
    log, stream = list(log), list(stream)
    known, met = {}, True
    for kind in {kind for kind, _ in stream}:
        old, new = (b"".join(data for k, data in part if k == kind) for part in (log, stream))
        known[kind] = overlap(old, new)
        met = met and (known[kind] > 0 or b"\n" not in new)
    result = log
    for kind, data in stream:
        result.append((kind, data[known[kind] :]))
        known[kind] = max(0, known[kind] - len(data))
    return result, met


def overlap(old: bytes, new: bytes) -> int:
    """The largest k so that `old` and `new[:k]` end alike, over the whole of the shorter one."""
    needle = old[-NEEDLE:]
    # A log that short is whole: the stream cannot reach further back, and few bytes would be found anywhere.
    end = len(new) if len(old) >= NEEDLE else min(len(old), len(new))
    while needle and (at := new.rfind(needle, 0, end)) >= 0:
        k = at + len(needle)
        common = min(k, len(old))
        if new[k - common : k] == old[len(old) - common :]:
            return k
        end = k - 1
    return next((k for k in range(min(len(needle), len(new)), 0, -1) if old.endswith(new[:k])), 0)


def recent(data: bytes, limit: int = LIMIT) -> bytes:
    """The last `limit` bytes; where some are cut off, from the beginning of a line if there is one."""
    if len(data) <= limit:
        return data
    tail = data[-limit:]
    return tail[tail.find(b"\n") + 1 :]
