"""`account …`: who you are to the server, and your token."""

from __future__ import annotations

from ..errors import Error
from . import config, door, output, rest
from .args import Flag, Options, command
from .session import require_token

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEADING = ("ID", "NAME", "DISPLAY NAME", "EMAIL", "ROLE")


@command("")
def whoami(options: Options) -> int:
    account = rest.client(config.load()).whoami()
    if options.json:
        output.json(account)
    elif options.quiet:
        output.line(account["name"])
    else:
        output.table(HEADING, [_row(account)])
    return 0


@command("")
def token(options: Options) -> int:
    if door.inside():
        raise Error("forbidden", "a session has no token that it could show", "run this outside of it")
    value = require_token(config.load())
    output.json({"token": value}) if options.json else output.line(value)
    return 0


@command(
    "",
    Flag("executor", "text", "leave it, and make one for that machine's executor (administrators)", value="HOSTNAME"),
)
def generate_token(options: Options) -> int:
    settings = config.load()
    if options["executor"]:
        body = {"name": options["executor"], "scope": "executor", "hostname": options["executor"]}
        value = rest.client(settings).create_token(body)["token"]
        output.json({"token": value}) if options.json else output.line(value)
        return 0
    saved = settings.source("user_token") != "BEAKER_TOKEN"
    if saved and (token := settings.token):
        settings.set("user_token", token)  # a file that cannot be written is told while the old token is good
    value = rest.client(settings).create_token()["token"]
    if saved:
        try:
            settings.set("user_token", value)
        except Error:
            output.say("The old token has ended, and the new one could not be saved. It is:")
            output.line(value)
            raise
        output.say(f"Saved your new token in {settings.path}; the old one has ended.")
        if options.json:
            output.json({"token": value})
        return 0
    output.say("The old token, from BEAKER_TOKEN, has ended. The new one:")
    output.json({"token": value}) if options.json else output.line(value)
    return 0


@command("")
def list_accounts(options: Options) -> int:
    accounts = rest.client(config.load()).list_accounts()["data"]
    if options.json:
        output.json(accounts)
    elif options.quiet:
        for account in accounts:
            output.line(account["name"])
    else:
        output.table(HEADING, [_row(account) for account in accounts])
    return 0


@command("")
def organizations(options: Options) -> int:
    found = rest.client(config.load()).list_organizations()["data"]
    if options.json:
        output.json(found)
    elif options.quiet:
        for org in found:
            output.line(org["name"])
    else:
        heading = ("ID", "NAME", "DISPLAY NAME", "DESCRIPTION")
        output.table(heading, [(o["id"], o["name"], o.get("displayName"), o.get("description")) for o in found])
    return 0


@command(
    "NAME",
    Flag("email", "text", "e-mail address", value="ADDRESS"),
    Flag("display-name", "text", "the person's name", value="NAME"),
    Flag("admin", "switch", "let it administer"),
    words=(1, 1),
)
def create(options: Options) -> int:
    wanted = {"name": options.words[0], "email": options["email"], "displayName": options["display-name"]}
    wanted["role"] = "admin" if options["admin"] else None
    account = rest.client(config.load()).create_account(
        {key: value for key, value in wanted.items() if value is not None}
    )
    if not account.get("token"):
        raise Error("internal", f"the server made the account {account.get('name')!r} without a token", "see its log")
    if options.json:
        output.json(account)
    elif options.quiet:
        output.line(account["token"])
    else:
        output.say(f"Created account {account['name']}. Its token, which is not shown again:")
        output.line(account["token"])
    return 0


def _row(account: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(account.get(key) for key in ("id", "name", "displayName", "email", "role"))
