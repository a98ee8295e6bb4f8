"""System packages. A package is there when what we need of it is, whoever installed it: docker-ce is an engine too."""

from __future__ import annotations

import importlib.util
import os
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
_APPARMOR = Path("/sys/module/apparmor/parameters/enabled")


def step(name: str, wanted: dict[str, tuple[str, ...]]) -> Step:
    return Step(name, lambda: bool(_missing(wanted)), lambda report: install(wanted, report))


def install(wanted: dict[str, tuple[str, ...]], report: Report) -> str:
    """Install what is missing."""
    done = names = _missing(wanted)
    while names:
        _install(names, report)
        names = [one for one in _missing(wanted) if one not in done]  # what shows only now
        done = done + names
    return f"installed {' '.join(done)}"


def _missing(wanted: dict[str, tuple[str, ...]]) -> list[str]:
    names = [package for package, programs in wanted.items() if not any(map(host.which, programs))]
    if wanted is TESTS and "docker.io" not in names and not host.which("docker"):
        names.append("docker-cli")  # a package of its own since Debian 13
    if "chromium" in names and "ID=debian" not in Path("/etc/os-release").read_text().splitlines():
        names.remove("chromium")  # Ubuntu has it as a snap only; the console's tests then skip
    if not _static(_BUSYBOX):
        names.append("busybox-static")
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
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    command([*apt, "update"], report, env=environment)
    command([*apt, "install", "-y", "--no-install-recommends", *names], report, env=environment)
