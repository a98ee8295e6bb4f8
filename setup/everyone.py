"""The `beaker` command for everybody on this machine: a copy that needs neither the checkout nor its environment.

Owns PROGRAM and DIRECTORY, where they are its own; a `beaker` that somebody else put there stays.
"""

from __future__ import annotations

import compileall
import shutil
from pathlib import Path

from . import host, recipe
from .steps import Report, Step

PROGRAM, DIRECTORY = Path("/usr/local/bin/beaker"), Path("/usr/local/lib/beaker")
PYTHON = DIRECTORY / "python"  # a link to the executor's, for doctor when no executor answers


def files() -> dict[Path, bytes]:
    """What is to be there. The same as in the default image."""
    found = {name.removeprefix("beaker/"): content for name, content in recipe.files("command") if "/" in name}
    return {PROGRAM if name == "launcher" else DIRECTORY / name: content for name, content in found.items()}


def foreign() -> bool:
    """Whether there is a `beaker` that is not ours."""
    try:
        return str(DIRECTORY).encode() not in PROGRAM.read_bytes()
    except FileNotFoundError:
        return False


def remove() -> list[Path]:
    """Remove it: what was there."""
    if foreign() or not PROGRAM.exists():
        return []
    PROGRAM.unlink()
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    return [PROGRAM, DIRECTORY]


def _missing() -> bool:
    linked = PYTHON.is_symlink() and PYTHON.readlink() == host.VENV / "bin/python"
    same = all(path.exists() and path.read_bytes() == text for path, text in files().items())
    return not foreign() and not (linked and same)


def _install(_report: Report) -> str:
    wanted = files()
    for path, content in wanted.items():
        if path != PROGRAM:
            host.write(path, content.decode())
    for path in set(DIRECTORY.rglob("*.py")) - wanted.keys():  # of an older version
        path.unlink()
    PYTHON.unlink(missing_ok=True)
    PYTHON.symlink_to(host.VENV / "bin/python")
    compileall.compile_dir(DIRECTORY, quiet=2)
    host.write(PROGRAM, wanted[PROGRAM].decode(), 0o755)  # last: it works from its first moment
    return f"{PROGRAM}"


step = Step("the command for everybody", _missing, _install)
