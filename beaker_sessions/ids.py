"""Makes what must be unguessable or unique: ULIDs and tokens. Owns their formats; must not store anything.

ULID: https://github.com/ulid/spec. A token is `bkr_`, 256 random bits and their CRC-32, both in base 62: the prefix
lets secret scanners find one in a repository, the checksum tells a mistyped one from a revoked one without a server.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import threading
import time
import zlib

PREFIX = "bkr_"
CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ULID = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_TOKEN = re.compile(rf"{PREFIX}([0-9A-Za-z]{{43}})([0-9A-Za-z]{{6}})")  # 62**43 > 2**256, 62**6 > 2**32

_lock = threading.Lock()
_last = 0


def ulid() -> str:
    """A new ULID. Grows within a process even when the clock stands still or jumps back."""
    global _last
    with _lock:
        fresh = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
        _last = fresh if fresh >> 80 > _last >> 80 else _last + 1
        return _digits(_last, CROCKFORD, 26)


def is_ulid(text: str) -> bool:
    return _ULID.fullmatch(text) is not None


def mint_token(secret: str = "", key: str = "") -> str:
    """A new secret token. Only its `hash_token` is ever stored.

    With a key, the token is a function of it and of `secret`, another token: so a repeated request can be answered
    again although nobody kept the first answer.
    """
    bits = hmac.digest(secret.encode(), b"token " + key.encode(), "sha256") if key else os.urandom(32)
    body = _digits(int.from_bytes(bits, "big"), BASE62, 43)
    return PREFIX + body + _checksum(body)


def looks_like_token(text: str) -> bool:
    """Whether the form and the checksum are right; says nothing about whether the token was ever given out."""
    match = _TOKEN.fullmatch(text)
    return match is not None and secrets.compare_digest(_checksum(match[1]), match[2])


def hash_token(token: str) -> str:
    """SHA-256 in hex. No salt and no stretching: a token is 256 random bits, not a password."""
    return hashlib.sha256(token.encode()).hexdigest()


def _checksum(body: str) -> str:
    return _digits(zlib.crc32(body.encode()), BASE62, 6)


def _digits(number: int, alphabet: str, length: int) -> str:
    out = ""
    for _ in range(length):
        number, digit = divmod(number, len(alphabet))
        out = alphabet[digit] + out
    return out
