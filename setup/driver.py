"""Which driver will run the sessions here: the executor's own, or Docker Engine where that one cannot.

Decided by trying, with the driver's own check, once for each kernel and setting; `make down` forgets it.
"""

from __future__ import annotations

import os
import subprocess

from . import daemon, host, installed, services
from .steps import Failed, Report, Step, do

_STAMP = host.STATE / "setup/driver"
_MODULE = "beaker_sessions.sandbox.oci.command"
STORAGE = host.STATE / "executor/oci"


def name() -> str:
    """oci or docker, "" when it is not known yet."""
    try:
        key, found = _STAMP.read_text().split("\n")
    except (OSError, ValueError):
        return ""
    return found if key == _key() else ""


def forget() -> None:
    _STAMP.unlink(missing_ok=True)


def sessions() -> int:
    """How many sessions the oci driver has here."""
    return int(ask("count", str(STORAGE)).stdout or 0) if (STORAGE / "sessions").exists() else 0


def remove() -> bool:
    """End the oci driver's sessions and remove what it made on this machine, its state apart: whether it had any."""
    if not STORAGE.exists():
        return False
    done = ask("remove", str(STORAGE), str(host.STATE), services.setting("bridge", "beaker0"))
    if done.returncode:
        raise Failed("the sessions could not be ended", done.stderr.splitlines()[-5:])
    return True


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    if not installed.PYTHON.exists():  # what is there is of a version that root ran from a checkout
        do(installed.step)
    argv = [str(installed.PYTHON), "-P", "-m", _MODULE, *arguments]
    return subprocess.run(argv, capture_output=True, text=True, cwd="/", env=daemon.environment())


def _key() -> str:
    return f"{os.uname().release} {services.setting('driver', 'auto')}"


def _choose(_report: Report) -> str:
    wanted, why = services.setting("driver", "auto"), ""
    if wanted == "auto":
        host.STATE.mkdir(parents=True, exist_ok=True)
        done = ask("probe", str(host.STATE))
        if done.returncode not in (0, 1):
            raise Failed("the check of this machine failed", done.stderr.splitlines()[-5:])
        wanted, why = ("docker", f": {done.stdout.strip()}") if done.returncode else ("oci", "")
    host.write(_STAMP, f"{_key()}\n{wanted}")
    return wanted + why


step = Step("sandbox driver", lambda: not name(), _choose)
