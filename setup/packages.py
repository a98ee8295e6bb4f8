"""System packages. A package is there when what we need of it is, whoever installed it: docker-ce is an engine too."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from . import host
from .steps import Failed, Report, Step, command

# package -> the programs that prove it, of which any will do
SESSION = {
    "conmon": ("conmon",),
    "iproute2": ("ip",),
    "iptables": ("iptables",),
    "mmdebstrap": ("mmdebstrap",),
    "nftables": ("nft",),
    "runc": ("runc", "crun"),
    "skopeo": ("skopeo",),
    "tini": ("/usr/bin/tini-static",),
}
DOCKER = {"docker.io": ("dockerd",)}  # where sessions cannot be run without, and for images on another's base
TESTS = {
    **SESSION,
    **DOCKER,
    "chromium": ("chromium",),
    "crun": ("crun",),
    "docker-registry": ("docker-registry",),
    "faketime": ("faketime",),
    "fuse3": ("fusermount3",),
    "git": ("git",),
    "hyperfine": ("hyperfine",),
    "openssh-client": ("ssh-agent",),
    "podman": ("podman",),
    "runc": ("runc",),
    "tmux": ("tmux",),
}
_BUSYBOX = Path("/bin/busybox")
_OURS = Path("/opt/beaker-sessions/busybox")  # as in `beaker_sessions.sandbox.busybox`
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")


def step(name: str, wanted: dict[str, tuple[str, ...]]) -> Step:
    return Step(name, lambda: bool(_missing(wanted) or not _busybox()), lambda report: install(wanted, report))


def install(wanted: dict[str, tuple[str, ...]], report: Report) -> str:
    """Install what is missing. No package that is there is replaced."""
    done = names = _missing(wanted)
    while names:
        _install(names, report)
        names = [one for one in _missing(wanted) if one not in done]  # what shows only now
        done = done + names
    if not _busybox():
        _fetch_busybox(report)
        done = [*done, f"BusyBox in {_OURS}"]
    return f"installed {', '.join(done)}"


def _missing(wanted: dict[str, tuple[str, ...]]) -> list[str]:
    names = [package for package, programs in wanted.items() if not any(map(host.which, programs))]
    if wanted is TESTS and "docker.io" not in names and not host.which("docker"):
        names.append("docker-cli")  # a package of its own since Debian 13
    if "chromium" in names and "ID=debian" not in Path("/etc/os-release").read_text().splitlines():
        names.remove("chromium")  # Ubuntu has it as a snap only; the console's tests then skip
    if not importlib.util.find_spec("ensurepip"):
        names.append("python3-venv")
    if not Path("/etc/ssl/certs/ca-certificates.crt").exists():
        names.append("ca-certificates")
    # With AppArmor in the kernel, Docker Engine refuses to start containers without its parser.
    if (
        "docker.io" in wanted
        and _APPARMOR.exists()
        and _APPARMOR.read_text().startswith("Y")
        and not host.which("apparmor_parser")
    ):
        names.append("apparmor")
    return names


def _busybox() -> bool:
    return _static(_OURS) or _static(_BUSYBOX)


def _fetch_busybox(report: Report) -> None:
    """The distribution's static one, in a place of our own: its package takes the place of `busybox`, of which the
    initramfs is, and has that made anew.
    """
    apt = _apt()
    with tempfile.TemporaryDirectory() as name:
        command([*apt, "update"], report)
        command([*apt, "-o", "APT::Sandbox::User=root", "download", "busybox-static"], report, cwd=name)
        (package,) = Path(name).glob("*.deb")
        command(["dpkg-deb", "--extract", str(package), f"{name}/root"], report)
        found = next(path for place in ("bin", "usr/bin") if (path := Path(name, "root", place, "busybox")).exists())
        _OURS.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        part = _OURS.with_name(f".busybox.{os.getpid()}")
        shutil.copyfile(found, part)
        part.chmod(0o755)
        part.replace(_OURS)


def _apt() -> list[str]:
    return ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]


def _static(program: Path) -> bool:
    """Whether it is there and names no dynamic loader, whose path is in an ELF file's first page."""
    try:
        with program.open("rb") as file:
            return b"/ld-" not in file.read(4096)
    except OSError:
        return False


def _install(names: list[str], report: Report) -> None:
    if not host.which("apt-get"):
        raise Failed(f"these packages are missing, and there is no apt-get to install them: {' '.join(names)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = _apt()
    command([*apt, "update"], report, env=environment)
    command([*apt, "install", "-y", "--no-install-recommends", *names], report, env=environment)
