"""The first account, named as the Unix user who set up, with its token in that user's `~/.beaker/config.yml`.

The command line's own code reads and writes that file, as that user: here is no second idea of its format.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import daemon, host, installed, services
from .steps import Failed, Report, Step, as_user, command

EXECUTOR_TOKEN = host.ETC / "executor.token"
_LOAD = "from beaker_sessions.cli import config; c = config.load(); "
_READ = _LOAD + "print(c.values.get('agent_address', '')); print(c.values.get('user_token', ''))"
_SAVE = _LOAD + "c.set('agent_address', sys.argv[1]); c.set('user_token', sys.stdin.readline().strip())"


def _missing() -> bool:
    address, token = _configured()
    if not EXECUTOR_TOKEN.exists() or not token:
        return True
    if address and address != services.address():
        return False  # a user of another server, which only that server can judge
    return services.ask("/api/v3/user", token) == 401


def _make(report: Report) -> str:
    caller = host.caller()
    address, token = _configured()
    if token and address and address != services.address():
        raise Failed(
            f"{caller.pw_name} is logged in to another server, {address}",
            ["keep that: BEAKER_CONFIG=~/.beaker/this-machine.yml make session"],
        )
    with tempfile.TemporaryDirectory() as directory:  # root's, mode 0700
        file = Path(directory, "token")
        program = [str(installed.CURRENT / "bin/beaker-server"), "init", "--account", caller.pw_name]
        program += ["--token-file", str(file), "--executor-token-file", str(EXECUTOR_TOKEN)]
        command(program, report, env=daemon.environment())
        EXECUTOR_TOKEN.chmod(0o600)
        _as_caller(_SAVE, services.address(), stdin=file.read_text())
    return f"made {caller.pw_name}, token in {os.environ.get('BEAKER_CONFIG') or '~/.beaker/config.yml'}"


def _configured() -> tuple[str, str]:
    """The caller's address and token, "" where there is none."""
    address, token = _as_caller(_READ).split("\n")[:2]
    return address, token


def _as_caller(program: str, *arguments: str, stdin: str = "") -> str:
    caller = host.caller()
    argv = [
        sys.executable,
        "-B",
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, {str(installed.PACKAGE)!r}); {program}",
        *arguments,
    ]
    user = as_user(caller.pw_uid, argv) if os.geteuid() != caller.pw_uid else {"args": argv}
    done: subprocess.CompletedProcess[str] = subprocess.run(**user, input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"cannot use the configuration of {caller.pw_name}", done.stderr.splitlines()[-5:])
    return done.stdout


step = Step("account", _missing, _make)
