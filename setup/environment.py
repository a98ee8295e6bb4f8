"""The Python environment `.venv`, for developing: what the lock file says, this checkout's package, and the launchers.

Root runs nothing of it, but tests of a checkout of its own; what `make session` installs is `installed.py`'s.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path

from . import host
from .steps import Report, Step, command

_LAUNCHERS = {"beaker-server": "beaker_sessions.server.main", "beaker-executor": "beaker_sessions.executor.main"}


def step() -> Step:
    lock = host.ROOT / "requirements-dev.txt"
    stamp = host.VENV / f".{lock.stem}"

    def missing() -> bool:
        return not stamp.exists() or stamp.read_text() != _key(lock) or not (host.VENV / "bin/python").exists()

    def do(report: Report) -> str:
        _create(report)
        python = str(host.VENV / "bin/python")
        pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
        command([*pip, "--require-hashes", "--no-deps", "-r", str(lock)], report, cwd=host.ROOT)
        _install_package(report)
        host.write(stamp, _key(lock))
        return "installed"

    return Step("Python environment for tests", missing, do, as_owner=True)


def launcher(directory: str, interpreter: str) -> str:
    """The `beaker` script: isolated from the user's environment and without `site`, which halves its start-up.

    It can be, because the command line needs the standard library alone. directory: the parent of `beaker_sessions`.
    The interpreter is the system's, not the environment's link to it: its path is short and has no spaces, whatever the
    checkout's, and a first line `#!` allows neither. The directory is held open, which shows that it is in use.
    """
    return (
        f"#!{interpreter} -IS\n"
        "import os, sys\n"
        f"os.open({directory!r}, os.O_RDONLY)\n"
        f"sys.path.insert(0, {directory!r})\n"
        "from beaker_sessions.cli.main import main\n"
        "sys.exit(main())\n"
    )


def program(python: Path, module: str) -> str:
    """A script for an environment's interpreter at any path: to sh its second line is an exec, to Python a string."""
    return f"""#!/bin/sh
'''exec' {shlex.quote(str(python))} -P "$0" "$@"
' '''
import sys
from {module} import main
sys.exit(main())
"""


def lock(report: Report) -> str:
    """Write both lock files anew from pyproject.toml, with pip-tools in an environment of its own."""
    tools = host.ROOT / "build/lock"
    command([sys.executable, "-m", "venv", str(tools)], report)
    command([str(tools / "bin/pip"), "install", "--disable-pip-version-check", "pip-tools"], report)
    options = "--generate-hashes --allow-unsafe --strip-extras --no-header --no-annotate --no-emit-options"
    options += " --no-emit-index-url --no-emit-trusted-host --no-emit-find-links"
    base = [str(tools / "bin/pip-compile"), "--quiet", *options.split(), "--upgrade", "pyproject.toml"]
    command([*base, "-o", "requirements.txt"], report, cwd=host.ROOT)
    development = [*base, "--extra", "dev", "-c", "requirements.txt", "-o", "requirements-dev.txt"]
    command(development, report, cwd=host.ROOT)
    command([*base[:-1], "images/tools/uv.in", "-o", "images/tools/uv.txt"], report, cwd=host.ROOT)
    return "written"


def _key(lock: Path) -> str:
    """What an environment depends on. Another checkout's path, or Python, makes another environment."""
    parts = (lock.read_bytes(), str(host.ROOT).encode(), sys.executable.encode(), str(sys.version_info[:2]).encode())
    return hashlib.sha256(b"\0".join(parts) + Path(__file__).read_bytes()).hexdigest()


def _create(report: Report) -> None:
    version = host.VENV / ".python"
    wanted = f"{sys.executable} {sys.version_info[0]}.{sys.version_info[1]} {host.ROOT}"
    if not version.exists() or version.read_text() != wanted or not (host.VENV / "bin/python").exists():
        report("creating")
        command([sys.executable, "-m", "venv", "--clear", str(host.VENV)], report)
        host.write(version, wanted)


def _install_package(report: Report) -> None:
    """Put the checkout on the environment's path by a `.pth` file: nothing is built, and edits take effect at once."""
    (packages,) = (host.VENV / "lib").glob("python3*/site-packages")
    host.write(packages / "beaker_sessions.pth", f"{host.ROOT}\n")
    host.write(host.VENV / "bin/beaker", launcher(str(host.ROOT), sys.executable), 0o755)
    for name, module in _LAUNCHERS.items():
        host.write(host.VENV / "bin" / name, program(host.VENV / "bin/python", module), 0o755)
    report("compiling")
    command([sys.executable, "-m", "compileall", "-q", str(host.ROOT / "beaker_sessions")], report)
