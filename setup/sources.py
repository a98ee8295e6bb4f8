"""Where this machine gets its distribution's packages, so that a local mirror serves the image too. Reads only.

The two formats are sources.list(5)'s: a line for each source, and deb822 paragraphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import host

APT = Path("/etc/apt")


def sources(directory: Path = APT, release: str = "") -> list[str]:
    """One-line sources of the distribution itself: the release, its updates and its security updates.

    Other people's repositories are left out: what the image holds should not depend on them.
    """
    release = release or host.codename()
    suites = {release, f"{release}-updates", f"{release}-security"}
    files = [directory / "sources.list", *sorted((directory / "sources.list.d").glob("*"))]
    found = []
    for file in files:
        if file.suffix in (".list", ".sources") and file.is_file():
            parse = _paragraphs if file.suffix == ".sources" else _lines
            for options, address, suite, components in parse(file.read_text()):
                if suite in suites and "main" in components:
                    found.append(" ".join(filter(None, ("deb", options, address, suite, *components))))
    return list(dict.fromkeys(found))


def _lines(text: str) -> Iterator[tuple[str, str, str, list[str]]]:
    for line in text.splitlines():
        kind, _, rest = line.partition("#")[0].strip().partition(" ")
        if kind == "deb":
            options, rest = rest.strip().split("]", 1) if rest.strip().startswith("[") else ("", rest)
            words = rest.split()
            if len(words) > 2:
                yield f"{options}]" if options else "", words[0], words[1], words[2:]


def _paragraphs(text: str) -> Iterator[tuple[str, str, str, list[str]]]:
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        for line in paragraph.splitlines():
            name, colon, value = line.partition(":")
            if colon and not line.startswith(("#", " ")):
                fields[name.lower()] = value.strip()
        if "deb" in fields.get("types", "").split() and fields.get("enabled", "yes") != "no":
            key = fields.get("signed-by", "")  # empty for a key in the paragraph itself: apt's own keys then
            for address in fields.get("uris", "").split():
                for suite in fields.get("suites", "").split():
                    yield f"[signed-by={key}]" if key else "", address, suite, fields.get("components", "").split()
