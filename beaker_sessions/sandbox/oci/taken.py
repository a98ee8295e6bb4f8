"""Which ids of this machine others give out, beside its account files: SSSD, `useradd`, systemd.

Reads their settings; says nothing where they have none. For `userns` and `doctor`, which compare them with
subordinate ids.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

Given = tuple[str, int, int]  # (who, first id, last id)

# UIDS-GIDS.md of systemd. Its range for containers is left out: our ranges are that, too.
SYSTEMD = (
    ("systemd-homed", 60001, 60513),
    ("systemd's dynamic users", 61184, 65519),
    ("systemd's foreign images", 2147352576, 2147418111),
)
# sssd-ldap(5) and sssd-ad(5): where ids are made of security identifiers; and the only bounds where they are not
MAPPED = (200000, 2000200000)
# Sources of nsswitch.conf(5) that know people of this machine alone, and list them.
LOCAL = {"files", "compat", "db", "systemd", "mymachines", "altfiles", "extrausers"}


def people(etc: Path) -> Iterator[Given]:
    """Of people whom the directory services know that this machine asks; SSSD's default where one does not say which.

    SSSD without settings is not there: distributions name it whether or not it is used.
    """
    try:
        text = (etc / "nsswitch.conf").read_text("utf-8", "replace")
    except OSError:
        return
    lines = re.findall(r"^[ \t]*(?:passwd|group|initgroups):([^#\n]*)", text, re.MULTILINE)
    sources = {word for line in lines for word in re.sub(r"\[[^]]*\]", " ", line).split()}
    for source in sorted(sources - LOCAL):
        if source == "sss":
            yield from directories(etc)
        elif source == "winbind" and (given := list(_winbind(etc))):
            yield from given
        else:
            yield f"the directory service {source} (nsswitch.conf)", MAPPED[0], MAPPED[1] - 1


def _winbind(etc: Path) -> Iterator[Given]:
    """Source: smb.conf(5), `idmap config DOMAIN : range`."""
    try:
        text = (etc / "samba/smb.conf").read_text("utf-8", "replace")
    except OSError:
        return
    pattern = r"^\s*idmap config\s+([^:\n]+?)\s*:\s*range\s*=\s*(\d+)\s*-\s*(\d+)"
    for domain, first, last in re.findall(pattern, text, re.MULTILINE | re.IGNORECASE):
        yield f"winbind's domain {domain}", int(first), int(last)


def directories(etc: Path) -> Iterator[Given]:
    """Of people whom a directory service knows. Raises nothing: what cannot be read is not there."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    for path in (etc / "sssd/sssd.conf", *sorted((etc / "sssd/conf.d").glob("*.conf"))):
        try:
            parser.read_string(path.read_text("utf-8", "replace"), str(path))
        except (OSError, configparser.Error):
            continue
    for name in parser.sections():
        if not name.startswith("domain/"):
            continue
        domain, values = name.removeprefix("domain/"), parser[name]
        provider = values.get("id_provider", "")
        maps = values.get("ldap_id_mapping", str(provider == "ad")).strip().lower() == "true"
        if provider in ("files", "proxy"):
            continue
        if maps:
            first = _number(values, "ldap_idmap_range_min", MAPPED[0])
            last = _number(values, "ldap_idmap_range_max", MAPPED[1]) - 1
        else:  # max_id 0 is no bound; FreeIPA's default is the same
            first, last = _number(values, "min_id", 1), _number(values, "max_id", 0)
            if not last:
                first, last = max(first, MAPPED[0]), MAPPED[1] - 1
        yield f"SSSD's domain {domain}", first, last


def local(etc: Path) -> Iterator[Given]:
    """Of people and services whom this machine's own tools make: login.defs(5), and systemd."""
    defs = _definitions(etc)
    for kind in ("UID", "GID"):
        first, last = _number(defs, f"{kind}_MIN", 1000), _number(defs, f"{kind}_MAX", 60000)
        yield f"useradd ({kind}_MIN in login.defs)", first, last
    yield from SYSTEMD


def subordinate(etc: Path) -> Given:
    """Where `useradd` takes subordinate ids from."""
    defs = _definitions(etc)
    return "useradd", _number(defs, "SUB_UID_MIN", 100000), _number(defs, "SUB_UID_MAX", 600100000)


def problems(etc: Path, ids: tuple[int, int], ranges: list[tuple[str, int, int]]) -> Iterator[tuple[str, str]]:
    """What overlaps, and what mends it. ids: the setting; ranges: those that accounts have, (name, first, count)."""
    people = list(directories(etc))
    for who, first, last in (*people, *local(etc)):
        if first < ids[1] and ids[0] <= last:
            yield f"subordinateIds {ids[0]}-{ids[1] - 1} overlaps the ids {first}-{last} of {who}", "choose others"
    for name, start, count in ranges:
        for who, first, last in people:
            if first < start + count and start <= last:
                what = f"the subordinate ids {start}… of {name} lie among the ids {first}-{last} of {who}"
                mend = f"give {name} others, when none of their sessions runs"
                yield f"{what}, and whose id is one of them gets no session", mend
    tool, first, last = subordinate(etc)
    for who, low, high in people:
        if low <= last and first <= high:
            what = f"{tool} gives new users subordinate ids from {first}-{last}, where {who} has people"
            yield what, f"set SUB_UID_MIN and SUB_GID_MIN in {etc}/login.defs above {high}, and SUB_…_MAX"


def _definitions(etc: Path) -> dict[str, str]:
    try:
        lines = (etc / "login.defs").read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines if not line.lstrip().startswith("#")]
    return {line[0]: line[1] for line in words if len(line) >= 2}


def _number(values: Mapping[str, str], key: str, default: int) -> int:
    try:
        return int(values.get(key, ""), 0)
    except ValueError:
        return default
