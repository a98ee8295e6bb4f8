"""`credential …`: Git's credential helper, with what it is told kept sealed on the server, the same on every machine.

Owns Git's protocol (gitcredentials(7), git-credential(1), "INPUT/OUTPUT FORMAT") and how credentials are kept: a secret
for each host in the workspace `git`, a JSON list in it. So `beaker secret delete -w git HOST` forgets it everywhere.
"""

from __future__ import annotations

import sys
import time

from ..errors import Error
from . import config, rest
from .args import Options, command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..client import Client

    Credential = dict[str, str]

WORKSPACE = "git"
PLACE = ("protocol", "host", "path", "username")  # what tells one credential from another
KEPT = (*PLACE, "password", "password_expiry_utc", "oauth_refresh_token")
LIMIT = 63  # characters of a secret's name


@command("")
def get(options: Options) -> int:  # noqa: ARG001
    """Tell Git the first credential that fits. Saying nothing makes Git ask the next helper, or the user."""
    wanted = _given()
    for credential in _read(rest.client(config.load()), _name(wanted)):
        if _fits(wanted, credential) and not _expired(credential):
            for key in KEPT:
                if key not in ("path",) and key in credential:
                    sys.stdout.write(f"{key}={credential[key]}\n")
            break
    return 0


@command("")
def store(options: Options) -> int:  # noqa: ARG001
    """Keep a credential that a server has accepted."""
    new = {key: value for key, value in _given().items() if key in KEPT}
    if "username" in new and "password" in new and not _expired(new):
        place = {key: new.get(key) for key in PLACE}
        _change(new, lambda old: {key: old.get(key) for key in PLACE} != place, [new])
    return 0


@command("")
def erase(options: Options) -> int:  # noqa: ARG001
    """Forget a credential that a server has refused; with a password, only if it is still that one."""
    refused = _given()
    _change(refused, lambda old: not _fits(refused, old, (*PLACE, "password")), [])
    return 0


def _given() -> Credential:
    """What Git says on standard input, up to an empty line."""
    given: Credential = {}
    for raw in sys.stdin.buffer:
        line = raw.decode("utf-8", "surrogateescape").rstrip("\n")
        if not line:
            break
        key, equals, value = line.partition("=")
        if equals:
            given[key] = value
    return given


def _change(about: Credential, keep: Callable[[Credential], bool], more: list[Credential]) -> None:
    server, name = rest.client(config.load()), _name(about)
    before = _read(server, name)
    after = [old for old in before if keep(old) and not _expired(old)] + more
    if after:
        import json

        if after != before:
            server.write_secret(WORKSPACE, name, json.dumps(after).encode())
    elif before:
        server.delete_secret(WORKSPACE, name)


def _read(server: Client, name: str) -> list[Credential]:
    import json

    try:
        found = json.loads(server.read_secret(WORKSPACE, name))
    except Error as error:
        if error.code == "not_found":
            return []
        raise
    except ValueError:
        return []  # written by hand, and not ours to use
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _name(about: Credential) -> str:
    """The name of a host's secret. Two hosts may share one: each credential says whose it is."""
    host = about.get("host") or "local"
    name = "".join(char if char.isascii() and (char.isalnum() or char in ".-") else "_" for char in host)
    return (name if name[0].isalnum() else f"h{name}")[:LIMIT]


def _fits(wanted: Credential, credential: Credential, keys: tuple[str, ...] = PLACE) -> bool:
    """Whether all that is said of the wanted one is true of this one."""
    return all(wanted[key] == credential.get(key) for key in keys if key in wanted)


def _expired(credential: Credential) -> bool:
    expiry = credential.get("password_expiry_utc", "")
    return expiry.isdecimal() and int(expiry) <= time.time()
