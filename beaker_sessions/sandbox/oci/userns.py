"""User namespaces: the id map of a sandbox, and the range of subordinate ids that each account has for itself.

Owns: /etc/subuid and /etc/subgid (subuid(5)), to which ranges are added under the lock of Debian's `passwd` package, so
that `useradd` and `usermod` may run at the same time. The maps are pure functions.

The caller's own ids are the same inside and outside, so that files in a home have their right owner on both sides;
every other id, root first, is one of the account's own range, which means nobody on this machine.

Directory services (LDAP, SSSD) do not list their users, so who has which id cannot be known beforehand. Therefore
ranges lie where directories give out no ids, and nobody gets a sandbox whose own ids lie in anybody's range.
"""

from __future__ import annotations

import contextlib
import grp
import itertools
import os
import pwd
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ...errors import Error
from ...model import Identity
from ..subordinate import ETC, Range, check_own, everybody, ranges
from . import taken
from .mounts import IdMap

SIZE = 65536
# Above what SSSD and FreeIPA give to people by default (sssd-ldap(5), ldap_idmap_range_max: 2000200000) and below the
# "foreign" ids of systemd (UIDS-GIDS.md), which calls this unused; multiples of SIZE. 2245 accounts.
FIRST, LAST = 30521 * SIZE, 0x7FFE0000
MOST = 1 << 31  # above it, some file systems and programs take ids for negative
LINES = 120  # what the kernel takes in one write of a page, with some room
PATIENCE = 10.0  # seconds to wait for the lock


def interval(text: str) -> tuple[int, int]:
    """`FIRST-LAST` as the first id and the one after the last. Raises Error invalid where no range fits in."""
    first, _, last = text.partition("-")
    try:
        result = int(first), int(last) + 1
    except ValueError:
        result = (0, 0)
    if not SIZE <= result[0] <= result[1] - SIZE <= MOST - SIZE:
        example = f"for example {FIRST}-{LAST - 1}"
        raise Error("invalid", f"subordinateIds: {text!r} is not FIRST-LAST with {SIZE} ids or more", example)
    return result


def id_map(start: int, own: Iterable[int]) -> IdMap:
    """Ids 0 to SIZE - 1 inside are start… outside, except that the `own` ones, none of which is of that range, are
    themselves.

    When the kernel could not take so many, the last of `own` are left out.
    """
    result: list[tuple[int, int, int]] = []
    at = 0
    kept = sorted(list(dict.fromkeys(own))[: (LINES - 1) // 2])
    for id in kept:
        if id >= SIZE:
            continue
        if id > at:
            result.append((at, start + at, id - at))
        result.append((id, id, 1))
        at = id + 1
    if at < SIZE:
        result.append((at, start + at, SIZE - at))
    return result + [(id, id, 1) for id in kept if id >= SIZE]


def mapped(map: IdMap, id: int) -> bool:
    return any(first <= id < first + count for first, _, count in map)


def outside(map: IdMap, id: int) -> int:
    """What an id inside is on this machine. Raises KeyError for one that is not mapped."""
    for first, start, count in map:
        if first <= id < first + count:
            return start + id - first
    raise KeyError(id)


def maps(identity: Identity, start: int, gids: Iterable[int] = ()) -> tuple[IdMap, IdMap]:
    """The uid and gid maps of a caller's sandbox; gids: further groups that are the same on both sides.

    Root's are never: the group root is left out. Raises Error forbidden for root, or a user whose own group it is.
    """
    if 0 in (identity.uid, identity.gid):
        raise Error("forbidden", f"{identity.name} is root, who is never the same in a sandbox", "use another user")
    groups = [gid for gid in (*sorted(identity.groups), *gids) if gid != 0]
    return id_map(start, [identity.uid]), id_map(start, [identity.gid, *groups])


def subordinate(identity: Identity, directory: Path = ETC, first: int = FIRST, last: int = LAST) -> int:
    """The first id of the account's own range of SIZE, in both files, allotted from `first` on when there is none.

    Raises Error conflict when its range overlaps another account's, holds a real account, or lies where a directory
    service of this machine has people; forbidden when an id of the account lies in anybody's.
    """
    for attempt in (1, 2):
        known = everybody(directory)
        check_own(identity, known)
        uids, gids = list(known.uids), list(known.gids)
        names = {identity.name, str(identity.uid)}
        start = next((s for name, s, n in uids if name in names and n >= SIZE and _covered(gids, names, s)), None)
        if start is not None:
            for name, other, count in [*uids, *gids]:
                if name not in names and other < start + SIZE and start < other + count:
                    raise Error(
                        "conflict",
                        f"the subordinate ids {start}… of {identity.name} overlap those of {name}",
                        f"give each its own range in {directory}/subuid and {directory}/subgid",
                    )
            if account := _account(identity, start):
                raise Error(
                    "conflict",
                    f"the subordinate ids {start}… of {identity.name} hold the account {account}",
                    f"give {identity.name} another range in {directory}/subuid and {directory}/subgid",
                )
            for who, lowest, highest in taken.people(directory):
                if lowest < start + SIZE and start <= highest:
                    name = identity.name
                    what = f"the subordinate ids {start}… of {name} lie among the ids {lowest}-{highest} of {who}"
                    lines = f"the lines of {name} out of {directory}/subuid and {directory}/subgid"
                    raise Error(
                        "conflict",
                        what,
                        f"the administrator takes {lines} while none of their sessions runs; new ids come from "
                        "`subordinateIds`, and files of the old ones in their home need chown",
                    )
            return start
        if attempt == 1:
            _allot(identity, directory, first, last)
    raise Error("internal", f"no subordinate ids for {identity.name} in {directory}/subuid after allotting them")


def _covered(ranges: list[Range], names: set[str], start: int) -> bool:
    return any(name in names and s <= start and start + SIZE <= s + n for name, s, n in ranges)


def _account(identity: Identity, start: int) -> str:
    """A real user or group, of those that can be known, whose id lies in a range; "" for none."""
    own = {identity.uid: identity.name, **identity.groups}
    return next((name for id, name in (*own.items(), *_listed()) if start <= id < start + SIZE), "")


def _listed() -> Iterator[tuple[int, str]]:
    """The users and groups of this machine that can be listed."""
    yield from ((entry.pw_uid, entry.pw_name) for entry in pwd.getpwall())
    yield from ((entry.gr_gid, entry.gr_name) for entry in grp.getgrall())


def overlaps(found: Iterable[Range], accounts: Mapping[int, str]) -> Iterator[str]:
    """What is wrong with the ranges of a file: those of two accounts that overlap, and those that hold a real one.

    accounts: names by uid.
    """
    ordered = sorted(found, key=lambda entry: entry[1])
    for (name, start, count), (other, second, _) in itertools.pairwise(ordered):
        if name != other and second < start + count:
            yield f"the ranges of {name} and {other} overlap"
    for name, start, count in ordered:
        for id, account in accounts.items():
            if start <= id < start + count:
                yield f"the range of {name} holds the account {account}"


def _allot(identity: Identity, directory: Path, lowest: int, last: int) -> None:
    """Add the first range that is free in both files. Raises Error unavailable when there is none, or no lock."""
    files = (directory / "subuid", directory / "subgid")
    with _locked(files[0]), _locked(files[1]):
        taken = [(s, n) for file in files for _, s, n in ranges(file)]
        taken += [(id, 1) for id in (identity.uid, *identity.groups, *(id for id, _ in _listed()))]
        starts = range(lowest, last - SIZE + 1, SIZE)
        free = (s for s in starts if all(s + SIZE <= first or first + n <= s for first, n in taken))
        start = next(free, None)
        if start is None:
            raise Error("unavailable", "no subordinate ids are left", f"free some in {files[0]} and {files[1]}")
        for file in files:
            text = file.read_text("utf-8", "surrogateescape") if file.exists() else ""
            text += "" if text.endswith("\n") or not text else "\n"
            temporary = file.with_name(f"{file.name}+")
            temporary.write_text(f"{text}{identity.name}:{start}:{SIZE}\n", "utf-8", "surrogateescape")
            temporary.chmod(0o644)
            temporary.replace(file)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """FILE.lock as `useradd` makes it: a link to a file with the holder's pid; a dead holder's lock is broken."""
    lock = file.with_name(f"{file.name}.lock")
    own = file.with_name(f"{file.name}.{os.getpid()}.{os.urandom(4).hex()}")
    own.write_text(f"{os.getpid()}\0")
    deadline = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                os.link(own, lock)
                break
            except FileExistsError:
                with contextlib.suppress(FileNotFoundError):
                    holder = lock.read_text().rstrip("\0\n")
                    if not holder.isdigit() or not Path(f"/proc/{holder}").exists():
                        lock.unlink()
                        continue
            if time.monotonic() > deadline:
                raise Error("unavailable", f"{lock} is held by another program", "try again; if none runs, remove it")
            time.sleep(0.05)
        yield
        lock.unlink()
    finally:
        own.unlink()
