"""Seals secrets before they reach the database: AES-256-GCM under a key that lives in a file of its own.

Owns that file and the form of what is sealed: one byte for the version, a 12-byte random nonce, ciphertext and tag
(NIST SP 800-38D). Whoever has a copy of the database, or of its backup, has no secret. Must not know whose secrets
they are.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from ..errors import Error

VERSION = b"\x01"
NONCE, KEY = 12, 32  # bytes


class Seal:
    """The key in the file `path`, which is made, for root alone, unless it is there.

    Raises Error unavailable when it cannot be read or made, invalid when it is not a key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _make(path)
            key = path.read_bytes()
        except OSError as error:
            hint = "run it as a user who may, or set --key"
            raise Error("unavailable", f"cannot read or make the key {path}: {error.strerror}", hint) from error
        if len(key) != KEY:
            raise Error("invalid", f"{path} is no key of {KEY} bytes", "restore it from its backup")
        self._cipher = AESGCM(key)

    def close(self, value: bytes, place: str) -> bytes:
        """`value` sealed, so that it opens at the same place only and cannot be put in place of another."""
        nonce = os.urandom(NONCE)
        return VERSION + nonce + self._cipher.encrypt(nonce, value, VERSION + place.encode())

    def open(self, sealed: bytes, place: str) -> bytes:
        """Raises Error unavailable when it was sealed with another key or for another place, or was changed."""
        nonce, rest = sealed[1 : 1 + NONCE], sealed[1 + NONCE :]
        try:
            if sealed[:1] != VERSION:
                raise InvalidTag
            return self._cipher.decrypt(nonce, rest, VERSION + place.encode())
        except InvalidTag:
            hint = "ask the administrator to restore the key, or write the secret again"
            raise Error("unavailable", f"a secret cannot be opened with the key {self.path}", hint) from None


def _make(path: Path) -> None:
    """A new key in one step: of several servers that start at once, one makes it and all use it."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(os.urandom(KEY))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(new, path)
        except FileExistsError:
            return
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # a secret must not outlive the key that opens it
        finally:
            os.close(folder)
    finally:
        new.unlink(missing_ok=True)
