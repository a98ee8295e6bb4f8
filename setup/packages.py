"""System packages. A package is there when what we need of it is, whoever installed it: docker-ce is an engine too."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from . import host
from .steps import Failed, Report, Step, command

# package -> the program that proves it
SESSION = {"docker.io": "dockerd", "mmdebstrap": "mmdebstrap"}
TESTS = {
    "busybox-static": "busybox",  # foreign images are made of it
    "conmon": "conmon",
    "crun": "crun",
    "docker-registry": "docker-registry",
    "hyperfine": "hyperfine",
    "runc": "runc",
    "tmux": "tmux",
}


def step(wanted: dict[str, str]) -> Step:
    name = "system packages" if wanted is SESSION else "system packages for tests"
    return Step(name, lambda: bool(_missing(wanted)), lambda report: _install(_missing(wanted), report))


def _missing(wanted: dict[str, str]) -> list[str]:
    names = [package for package, program in wanted.items() if not host.which(program)]
    if wanted is SESSION:
        if not importlib.util.find_spec("ensurepip"):
            names.append("python3-venv")
        if not Path("/etc/ssl/certs/ca-certificates.crt").exists():
            names.append("ca-certificates")
        # With AppArmor in the kernel, Docker Engine refuses to start containers without its parser.
        enabled = Path("/sys/module/apparmor/parameters/enabled")
        if enabled.exists() and enabled.read_text().startswith("Y") and not host.which("apparmor_parser"):
            names.append("apparmor")
    return names


def _install(names: list[str], report: Report) -> str:
    if not host.which("apt-get"):
        raise Failed(f"these packages are missing, and there is no apt-get to install them: {' '.join(names)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    command([*apt, "update"], report, env=environment)
    command([*apt, "install", "-y", "--no-install-recommends", *names], report, env=environment)
    return f"installed {' '.join(names)}"
