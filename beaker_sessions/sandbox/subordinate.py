"""Everybody's subordinate ids on this machine, and who must have none of them as their own. Format: subuid(5).

Reads /etc/subuid and /etc/subgid. Must not write them: that is for the driver whose sandboxes use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import Error
from ..model import Identity

ETC = Path("/etc")
Range = tuple[str, int, int]  # (name or uid, first id, count)


@dataclass(frozen=True)
class Ranges:
    """Of users, and of groups."""

    uids: tuple[Range, ...] = ()
    gids: tuple[Range, ...] = ()


NONE = Ranges()


def everybody(directory: Path = ETC) -> Ranges:
    return Ranges(tuple(ranges(directory / "subuid")), tuple(ranges(directory / "subgid")))


def ranges(path: Path) -> list[Range]:
    """What such a file says."""
    try:
        lines = path.read_text("utf-8", "surrogateescape").splitlines()
    except FileNotFoundError:
        return []
    fields = [line.split(":") for line in lines if not line.startswith("#")]
    return [(f[0], int(f[1]), int(f[2])) for f in fields if len(f) == 3 and f[1].isdigit() and f[2].isdigit()]


def check_own(identity: Identity, known: Ranges) -> None:
    """Raises Error forbidden when an id of a user lies in anybody's range: root of that sandbox would be this user."""
    groups = {identity.gid, *identity.groups}
    for kind, own, found in (("uid", {identity.uid}, known.uids), ("gid", groups, known.gids)):
        for name, first, count in found:
            if inside := [id for id in own if first <= id < first + count]:
                raise Error(
                    "forbidden",
                    f"the {kind} {inside[0]} of {identity.name} lies in the subordinate ids {first}… of {name}",
                    f"the administrator gives {name} another range in /etc/sub{kind}, when none of their sessions runs",
                )
