"""`docs/reference.md`, written from the command line's own table of commands, so that it cannot say anything else."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

from beaker_sessions.cli import args, main

PAGE = Path(__file__).parents[1] / "docs/reference.md"
HEAD = """# Commands

Every command takes `--format json` for scripts, `--quiet` to print ids and nothing else, and `--help`. Exit codes are
in the [guide](interactive.md#running-a-command).
"""


def text() -> str:
    return "\n".join([HEAD, *_lines()])


def _lines() -> Iterator[str]:
    for noun, what in main.TOP.items():
        if noun in main.NOUNS:
            yield from (f"## {noun}", "", f"{what}.", "")
        for name, (module, function, summary) in main.COMMANDS.items():
            if name.partition(" ")[0] == noun:
                command = getattr(importlib.import_module(f"{main.__package__}.{module}"), function)
                yield from _command(name, summary, command)


def _command(name: str, summary: str, command: args.Command) -> Iterator[str]:
    flags = [flag for flag in command.flags if flag not in args.GLOBAL]
    usage = " ".join(word for word in (f"beaker {name}", "[flags]" if flags else "", command.usage) if word)
    yield from (f"{'###' if ' ' in name else '##'} {name}", "", f"{summary}.", "", "```", usage, "```", "")
    if flags:
        yield from ("| flag | |", "| --- | --- |")
        for flag in flags:
            short = f"`-{flag.short}`, " if flag.short else ""
            value = "" if flag.kind == "switch" else f" {flag.value}".replace("|", "\\|")  # of a table's cells
            yield f"| {short}`--{flag.name}{value}` | {flag.help}{' (repeatable)' * flag.repeat} |"
        yield ""


if __name__ == "__main__":
    PAGE.write_text(text())
