"""The DNS resolvers of this machine, as far as a sandbox with a network of its own can reach them."""

from __future__ import annotations

from pathlib import Path

FILES = ("/run/systemd/resolve/resolv.conf", "/etc/resolv.conf")  # the first names no resolver on loopback


def text() -> str:
    """What `/etc/resolv.conf` of a sandbox says: this machine's, without resolvers that only it can reach."""
    found = next((Path(path).read_text() for path in FILES if Path(path).exists()), "")
    return "".join(line + "\n" for line in found.splitlines() if not _loopback(line))


def addresses() -> list[str]:
    """The resolvers of `text`."""
    lines = [line.split() for line in text().splitlines()]
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]


def _loopback(line: str) -> bool:
    words = line.split()
    return len(words) > 1 and words[0] == "nameserver" and (words[1].startswith("127.") or words[1] == "::1")
