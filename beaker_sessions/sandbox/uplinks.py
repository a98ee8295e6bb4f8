"""Which interfaces of this machine lead beyond it, told apart from those that lead to containers and virtual machines.

Sources: rtnetlink's attributes as ip-link(8) and ip-route(8) print them.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from typing import Any

WITHIN = ("veth", "tun", "dummy")  # kinds of a bridge's port at whose other end is a container or a virtual machine
NAME = re.compile(r'[^\s"\\*/]{1,15}')  # what can be said in a rule; the kernel allows more


def names(prefix: Iterable[str] = ()) -> list[str]:
    """Interfaces by which routes with a gateway lead, and bridges that another machine may be behind.

    prefix: of commands, to run them elsewhere. A machine whose interfaces cannot be read has none.
    """
    found = set()
    for route in _shown([*prefix, "ip", "-4", "-json", "route", "show", "table", "all"]):
        for way in (route, *route.get("nexthops", ())):
            if "dev" in way and (way.keys() & {"gateway", "via"} or route.get("dst") == "default"):
                found.add(way["dev"])
    for link in _shown([*prefix, "ip", "-json", "-details", "link", "show"]):
        if "master" in link and link.get("linkinfo", {}).get("info_kind") not in WITHIN:
            found.add(link["master"])
    return sorted(name for name in found if NAME.fullmatch(name))


def _shown(command: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(command, capture_output=True, check=False)
    return [entry for entry in json.loads(done.stdout or b"[]") if entry]
