"""The one place that everything printed passes, but for the bytes of a session's own terminal.

Owns escaping, tables and JSON. Names and messages come from elsewhere and may hold anything: control characters, escape
sequences and bidirectional overrides are shown as `\\x1b` or `\\u202e`, never sent to the terminal.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any


def escape(text: str) -> str:
    """`text` on one line with nothing in it that a terminal obeys or that reorders what is read."""
    if text.isprintable():
        return text
    # Everything in Unicode's categories "other" and "separator" but the space, formatting characters included.
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def say(text: str) -> None:
    """A line for the user, on standard error, where it never mixes with what a session's command prints.

    Nobody left to read it is no failure: a closed standard error must not change how a command ends.
    """
    try:
        sys.stderr.write(escape(text) + "\n")
        sys.stderr.flush()
    except OSError:
        pass


def line(text: str) -> None:
    """A line of the result, on standard output. Raises BrokenPipeError."""
    sys.stdout.write(escape(text) + "\n")


def json(value: Any) -> None:
    """`value` as indented JSON on standard output, ASCII only, so that nothing in it needs escaping."""
    import json as codec

    sys.stdout.write(codec.dumps(value, indent=4) + "\n")


def table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """An aligned table; what is None or empty is N/A."""
    cells = [list(heading)] + [[shown(cell) for cell in row] for row in rows]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(heading))]
    for row in cells:
        padded = [cell + " " * (width - _width(cell)) for cell, width in zip(row, widths)]
        line("  ".join(padded).rstrip())


def fields(pairs: Iterable[tuple[str, Any]]) -> None:
    """A description: one name and value a line; what is None or empty is left out."""
    known = [(name, shown(value)) for name, value in pairs if value not in (None, "", [])]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        line(f"{name + ':':{width + 1}}  {value}")


def shown(value: Any) -> str:
    """A value as text in a table."""
    if value is None or value == "":
        return "N/A"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return escape(str(value))


def duration(seconds: float) -> str:
    """HH:MM:SS, hours without bound."""
    whole = max(0, int(seconds))
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"


def memory(text: str | None) -> str | None:
    """A size of the REST API for people: exact ones come as a number of bytes."""
    return size(int(text)) if text and text.isdigit() else text


def size(count: float) -> str:
    """Bytes for people, as `62.5GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{round(count, 1):g}{unit}"
        count /= 1024
    return f"{round(count, 1):g}TiB"


def count(number: float, noun: str) -> str:
    shown = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"


def ports(mappings: dict[str, int], host: str) -> str:
    """Published ports for people: `HOST:32800->8000/tcp`."""
    return ", ".join(f"{host}:{port}->{own}/tcp" for own, port in mappings.items())


def _width(text: str) -> int:
    """How many columns of a terminal `text` takes: East Asian wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )
