"""Whether others than root can change what this process runs.

Owns no remedy: `make session` installs a copy where root alone writes. It guards against a mistake, such as root
running a user's checkout. Whoever has changed the files already may have changed this one too.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator

from .errors import Error

_LINKS = 40  # as many in one path as the kernel follows, path_resolution(7)


def check(program: str) -> None:
    """Raises Error forbidden when root runs a program of files that others can change."""
    if os.geteuid() == 0 and (found := next(problems(), "")):
        message = f"{program} does not run as root from files that others can change: {found}"
        raise Error("forbidden", message, "run `make session`, which installs it where root alone writes")


def problems() -> Iterator[str]:
    """What others can change of this process's code: path and reason, the interpreter's own library apart."""
    package = os.path.dirname(os.path.abspath(__file__))
    environment = [sys.prefix] if sys.prefix != sys.base_prefix else []
    script = getattr(sys.modules["__main__"], "__file__", None) or package
    yield from of([package, *environment], [sys.executable, script, *filter(None, sys.path)])


def of(trees: Iterable[str], files: Iterable[str]) -> Iterator[str]:
    """The same for these directories with all below, and these files; what is not there counts for nothing."""
    seen: set[tuple[str, bool]] = set()
    for tree in trees:
        yield from _way(tree, seen)
        yield from _below(tree, seen)
    for file in files:
        yield from _way(file, seen)


def _way(path: str, seen: set[tuple[str, bool]]) -> Iterator[str]:
    """Every directory and link that leads to a path, and what is there."""
    here, links = "/", 0
    names = os.path.join(os.getcwd(), path).split("/")[::-1]
    while names:
        name = names.pop()
        if name == "..":
            here = os.path.dirname(here)
        step = here if name in ("", ".", "..") else os.path.join(here, name)
        try:
            now = os.lstat(step)
        except FileNotFoundError:
            yield from _entry(here, os.lstat(here))  # in a directory that root alone writes, nobody else can make it
            return
        if (step, bool(names)) not in seen:
            seen.add((step, bool(names)))
            yield from _entry(step, now, way=bool(names))
        if stat.S_ISLNK(now.st_mode):
            links += 1
            if links > _LINKS:
                yield f"{path} is a loop of links"
                return
            target = os.readlink(step)
            names += target.split("/")[::-1]
            here = "/" if target.startswith("/") else here
        else:
            here = step


def _below(directory: str, seen: set[tuple[str, bool]]) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            now = entry.stat(follow_symlinks=False)
            yield from _entry(entry.path, now)
            if stat.S_ISDIR(now.st_mode):
                yield from _below(entry.path, seen)
            elif stat.S_ISLNK(now.st_mode):
                yield from _way(entry.path, seen)


def _entry(path: str, now: os.stat_result, way: bool = False) -> Iterator[str]:
    """way: only something in this directory counts, which others cannot replace in one like /tmp."""
    if now.st_uid not in (0, os.geteuid()):
        yield f"{path} belongs to uid {now.st_uid}"
        return
    mode = 0 if stat.S_ISLNK(now.st_mode) else now.st_mode
    if way and mode & stat.S_ISVTX:
        return
    if mode & stat.S_IWOTH:
        yield f"everybody can write {path}"
    elif mode & stat.S_IWGRP and now.st_gid != 0:
        yield f"the group {now.st_gid} can write {path}"
