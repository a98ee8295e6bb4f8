"""The `beaker` command for everybody on this machine: a link to what is installed.

Owns PROGRAM, where it is ours; a `beaker` that somebody else put there stays.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from . import installed
from .steps import Report, Step

PROGRAM = Path("/usr/local/bin/beaker")
_TARGET = installed.CURRENT / "bin/beaker"
_FORMER = Path("/usr/local/lib/beaker")  # where it was when PROGRAM was a file


def foreign() -> bool:
    """Whether there is a `beaker` that is not ours."""
    if PROGRAM.is_symlink():
        return not Path(os.readlink(PROGRAM)).is_relative_to(installed.BASE)
    return PROGRAM.exists() and str(_FORMER).encode() not in PROGRAM.read_bytes()


def remove() -> list[Path]:
    """Remove it: what was there."""
    if foreign():
        return []
    found = [path for path in (PROGRAM, _FORMER) if os.path.lexists(path)]
    PROGRAM.unlink(missing_ok=True)
    shutil.rmtree(_FORMER, ignore_errors=True)
    return found


def _missing() -> bool:
    return not foreign() and not (PROGRAM.is_symlink() and os.readlink(PROGRAM) == str(_TARGET))


def _install(_report: Report) -> str:
    """What the former command consists of stays until `make clean`: somebody may be using it."""
    new = PROGRAM.with_name(f".beaker.{os.getpid()}")
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    new.symlink_to(_TARGET)
    new.replace(PROGRAM)
    return f"{PROGRAM}"


step = Step("the command for everybody", _missing, _install)
