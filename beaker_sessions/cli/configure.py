"""`config …`: seeing and changing `~/.beaker/config.yml`."""

from __future__ import annotations

import os
import sys

from ..errors import Error
from . import args, config, output, terminal
from .args import Options, command


@command("")
def list_settings(options: Options) -> int:
    settings = config.load()
    values = {key: settings.get(key) or (config.ADDRESS if key == "agent_address" else "") for key in config.KEYS}
    if values["user_token"]:
        values["user_token"] = "(set)"  # `account token` prints it, on purpose
    if options.json:
        output.json({key: value or None for key, value in values.items()})
    else:
        rows = [(key, value, settings.source(key) or ("default" if value else "")) for key, value in values.items()]
        output.table(("KEY", "VALUE", "FROM"), rows)
    return 0


@command("KEY [VALUE]", words=(1, 2))
def set_value(options: Options) -> int:
    key = _key(options.words[0])
    value = options.words[1] if len(options.words) > 1 else _value(key)
    if not value.strip():
        raise Error("invalid", f"{key}: the value is empty", f"to remove it: beaker config unset {key}")
    settings = config.load()
    settings.set(key, value.strip())
    _warn_of_environment(key)
    return 0


@command("KEY", words=(1, 1))
def unset_value(options: Options) -> int:
    key = _key(options.words[0])
    settings = config.load()
    if key in settings.values:
        settings.set(key, None)
    _warn_of_environment(key)
    return 0


@command("")
def test(options: Options) -> int:
    """The server must answer and know the token; what is wrong is the error of the request itself."""
    from . import rest

    settings = config.load()
    account = rest.client(settings).whoami()
    if options.json:
        output.json({"address": settings.address, "account": account["name"]})
    elif options.quiet:
        output.line(account["name"])
    else:
        output.line(f"{settings.address} answers, and you are {account['name']}")
    return 0


def _key(text: str) -> str:
    if text not in config.KEYS:
        hint = args.closest(text, list(config.KEYS)) or f"known: {', '.join(config.KEYS)}"
        raise Error("invalid", f"no setting is called {text!r}", hint)
    return text


def _value(key: str) -> str:
    """From standard input, or typed without echo: everyone on the machine can see a command line."""
    if not os.isatty(0):
        return sys.stdin.readline()
    value = terminal.ask_secret(f"{key}: ")
    if value is None:
        raise Error("invalid", f"{key}: no value was given", "type it, or give it on standard input")
    return value


def _warn_of_environment(key: str) -> None:
    variable = config.ENVIRONMENT.get(key, "")
    if os.environ.get(variable):
        output.say(f"beaker: warning: {variable} is set and goes before the file")
