"""`secret …` and `workspace …`: values that only you can read, kept sealed on the server.

Owns how a value gets in and out: from standard input or typed without echo, byte for byte, and never by an argument
unless the user insists, since everybody on the machine can read those.
"""

from __future__ import annotations

import os
import sys

from ..errors import Error
from . import config, output, rest, terminal
from .args import Flag, Options, command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

WORKSPACE = Flag("workspace", "text", "the workspace (default: yours, named default)", "w", "WORKSPACE")
HEADING = ("NAME", "CREATED", "UPDATED")


@command("", WORKSPACE)
def list_secrets(options: Options) -> int:
    settings = config.load()
    found = rest.client(settings).list_secrets(workspace(options, settings))["data"]
    if options.json:
        output.json(found)
    elif options.quiet:
        for secret in found:
            output.line(secret["name"])
    else:
        output.table(HEADING, [(secret["name"], secret["created"], secret["updated"]) for secret in found])
    return 0


@command("NAME", WORKSPACE, words=(1, 1))
def read(options: Options) -> int:
    settings = config.load()
    value = rest.client(settings).read_secret(workspace(options, settings), options.words[0])
    sys.stdout.flush()
    sys.stdout.buffer.write(value)  # as it is: it may be a key, or a file
    sys.stdout.buffer.flush()
    if sys.stdout.isatty() and not value.endswith(b"\n"):
        output.line("")
    return 0


@command("NAME [VALUE]", WORKSPACE, words=(1, 2))
def write(options: Options) -> int:
    settings = config.load()
    name, given = options.words[0], options.words[1:]
    value = os.fsencode(given[0]) if given else _typed(name)
    secret = rest.client(settings).write_secret(workspace(options, settings), name, value)
    return _said(options, secret, f"Wrote secret {name}")


@command("NAME", WORKSPACE, words=(1, 1))
def delete(options: Options) -> int:
    settings, name = config.load(), options.words[0]
    rest.client(settings).delete_secret(workspace(options, settings), name)
    return _said(options, {"name": name}, f"Deleted secret {name}")


@command("")
def list_workspaces(options: Options) -> int:
    return _print(options, rest.client(config.load()).list_workspaces()["data"])


@command("WORKSPACE", words=(1, 1))
def get_workspace(options: Options) -> int:
    return _print(options, [rest.client(config.load()).get_workspace(options.words[0])])


@command("NAME", words=(1, 1))
def create_workspace(options: Options) -> int:
    made = rest.client(config.load()).create_workspace({"name": options.words[0]})
    return _said(options, made, f"Created workspace {made['fullName']}", quiet=made["fullName"])


def workspace(options: Options, settings: config.Config) -> str:
    named: str = options["workspace"] or settings.get("default_workspace") or "default"
    return named


def _typed(name: str) -> bytes:
    """What is piped in, byte for byte, else what is typed."""
    if not os.isatty(0):
        return sys.stdin.buffer.read()
    value = terminal.ask_secret(f"Value of {output.escape(name)}: ")
    if value is None:
        raise Error("invalid", f"secret {name}: no value was given", "type it, or pipe it in")
    return os.fsencode(value)


def _said(options: Options, answer: dict[str, Any], text: str, quiet: str = "") -> int:
    if options.json:
        output.json(answer)
    else:
        output.line((quiet or answer["name"]) if options.quiet else text)
    return 0


def _print(options: Options, workspaces: list[dict[str, Any]]) -> int:
    if options.json:
        output.json(workspaces)
    elif options.quiet:
        for each in workspaces:
            output.line(each["fullName"])
    else:
        rows = [(each["id"], each["fullName"], each["author"]["name"], each.get("created")) for each in workspaces]
        output.table(("ID", "NAME", "AUTHOR", "CREATED"), rows)
    return 0
