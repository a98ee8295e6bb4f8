"""Facts about this machine and who is asking: paths, accounts, processes. Changes nothing."""

from __future__ import annotations

import os
import pwd
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE = Path("/var/lib/beaker")
RUN = Path("/run/beaker")
ETC = Path("/etc/beaker")
LOGS = Path("/var/log/beaker")
SYSTEMD = Path("/run/systemd/system").is_dir()  # sd_booted(3)
PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
KEPT = ("BEAKER_CONFIG", *PROXIES)  # what a step under another user sees of this user's environment


def owner() -> pwd.struct_passwd:
    """Whose checkout this is, and so whose `.venv`; whoever asks, where it came with an id that is nobody's here."""
    try:
        return pwd.getpwuid(ROOT.stat().st_uid)
    except KeyError:
        return pwd.getpwuid(os.geteuid())


def caller() -> pwd.struct_passwd:
    """Who typed `make`: through sudo or not, and in a step that was started through sudo."""
    name = os.environ.get("SUDO_USER") if os.geteuid() == 0 else None
    return pwd.getpwnam(name) if name else pwd.getpwuid(os.geteuid())


def home_environment(user: pwd.struct_passwd) -> dict[str, str]:
    """This process's environment as that user would have it."""
    return {**os.environ, "HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name}


def which(program: str) -> str | None:
    """The path of a program, those for administrators included: a user's PATH often lacks them."""
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin")


def codename() -> str:
    """The distribution's release as in its package sources, such as `bookworm` or `noble`."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    return release.get("VERSION_CODENAME", "").strip('"')


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks since boot (proc(5), field 22): with the pid, it names a process for good.

    None when there is no such process, or only its zombie.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def write(path: Path, text: str, mode: int = 0o644) -> None:
    """Replace a file in one step, so that nobody ever reads half of it, nor a secret before its mode is set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
            file.write(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
