"""What is known of vulnerabilities in the programs that sessions depend on, for `executor doctor`.

Owns: reading `vulnerabilities.yml`, which is dated and says where each fact is from, and comparing versions with it. A
distribution mends old versions without giving them a new number, so its package is judged by the version that the file
names, as dpkg compares versions, else by the vulnerabilities that its changelog names (Debian Policy 4.4, and Ubuntu's
custom). What neither says is said to be unknown, never good and never bad.
"""

from __future__ import annotations

import gzip
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from . import Finding

FILE = Path(__file__).with_suffix(".yml")
OLD = 180  # days after which the file is too old to rely on
DOCUMENTS = Path("/usr/share/doc")
NVIDIA = Path("/proc/driver/nvidia/version")
FINAL = 1 << 16  # of a version that is no release candidate
# Programs that tell their version, beside those of the drivers: name in the file -> command.
PROGRAMS = {"nvidia-container-toolkit": ("nvidia-ctk", "--version"), "slurm": ("slurmd", "-V")}
Version = tuple[int, int, int, int]  # major, minor, patch, release candidate


@dataclass(frozen=True)
class Flaw:
    """ids: CVEs mended together. effect: what they let an attacker do. line: how many parts of a version make a line of
    releases. fixed: the first version without them in each, ascending; () for unknown. packages: by distribution.
    """

    ids: tuple[str, ...]
    effect: str
    line: int
    fixed: tuple[str, ...]
    packages: tuple[tuple[str, str], ...]

    def mended(self, version: Version) -> bool:
        """By the program's own authors."""
        firsts = [parse(text) for text in self.fixed]
        line = version[: self.line]
        return any(
            version >= first if first[: self.line] == line else first == firsts[-1] < version for first in firsts
        )


@dataclass(frozen=True)
class Package:
    """A distribution's package. distribution: ID-VERSION_ID of os-release. changelog: "" where it was left out."""

    name: str
    version: str
    distribution: str
    changelog: str

    def mended(self, flaw: Flaw) -> tuple[str, ...]:
        """Those ids that it says it has mended."""
        named = dict(flaw.packages).get(self.distribution)
        if named and at_least(self.version, named):
            return flaw.ids
        return tuple(id for id in flaw.ids if id in self.changelog)


@cache
def known() -> dict[str, tuple[Flaw, ...]]:
    """By component."""
    return {
        name: tuple(
            Flaw(
                tuple(flaw["ids"]), flaw["effect"], component["line"],
                () if flaw["fixed"] == "unknown" else tuple(map(str, flaw["fixed"])),
                tuple((flaw.get("packages") or {}).items()),
            )
            for flaw in component["flaws"]
        )
        for name, component in _file()["components"].items()
    }  # fmt: skip


def age(today: date | None = None) -> Finding:
    """How old the file is."""
    written: date = _file()["date"]
    days = ((today or date.today()) - written).days
    what = f"what is known here of vulnerabilities is of {written.isoformat()}"
    if days > OLD:
        return Finding("warning", f"{what}, {days} days ago", "install a newer version of Beaker Sessions")
    return Finding("ok", what)


def installed() -> Iterator[Finding]:
    """Of what sessions depend on and no driver of ours runs."""
    yield age()
    for name, command in PROGRAMS.items():
        if shutil.which(command[0]):
            yield finding(name, _output(list(command)), command[0])
    if NVIDIA.exists() and (match := re.search(r"Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", NVIDIA.read_text())):
        yield judge("nvidia-driver", parse(match[1]), f"NVIDIA's driver {match[1]}", None)


def finding(name: str, text: str, program: str = "") -> Finding:
    """What doctor says of a component. text: what it, or its engine, says is its version. program: its file's name."""
    version = parse(text)
    if not version:
        return Finding("warning", f"{name} does not tell its version", f"{program or name} --version")
    package = _package(program or name)
    what = f"{name} {_number(version)}" + (f" ({package.name} {package.version})" if package else "")
    return judge(name, version, what, package)


def judge(name: str, version: Version, what: str, package: Package | None) -> Finding:
    """The same from what was found out. what: the text for name and version. package: None for none."""
    opened = [flaw for flaw in known().get(name, ()) if not flaw.mended(version)]
    said = {id for flaw in opened for id in (package.mended(flaw) if package else ())}
    left = [flaw for flaw in opened if not said.issuperset(flaw.ids)]
    if not left:
        mended = f": its package has mended {', '.join(id for flaw in opened for id in flaw.ids)}" if opened else ""
        return Finding("ok", what + (mended or ", without a vulnerability that is known here"))
    listed = "; ".join(f"{', '.join(id for id in flaw.ids if id not in said)} ({flaw.effect})" for flaw in left)
    if package is None:
        mends = "; ".join(f"{flaw.ids[0]} in {' and '.join(flaw.fixed) or 'no version known here'}" for flaw in left)
        return Finding("warning", f"{what} has {listed}; mended: {mends}", f"install a newer {name}")
    named = [flaw for flaw in left if package.distribution in dict(flaw.packages)]
    mend = f"apt-get update; apt-get install --only-upgrade {package.name}"
    if named:
        first = dict(named[-1].packages)[package.distribution]
        return Finding("warning", f"{what} has {listed}; its package mends it in {first}", mend)
    silent = f"its package does not say that it has mended {listed}; it may have, or not"
    if newest(package):
        return Finding("ok", f"{what} is the newest that apt knows; {silent}")
    return Finding("warning", f"{what}: {silent}", mend)


def newest(package: Package) -> bool:
    """Whether apt knows no newer version of a package that is installed."""
    if not shutil.which("apt-cache"):
        return False
    found = re.search(r"Candidate: (\S+)", _output(["apt-cache", "policy", package.name]))
    return found is not None and found[1] == package.version


def parse(text: str) -> Version:
    """The first version in a text; () for none."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?(?:[-~]rc\.?(\d+))?", text)
    if not match:
        return ()  # type: ignore[return-value]
    major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch or 0), int(candidate or FINAL)


def at_least(version: str, other: str) -> bool:
    """Whether a package's version is another or later, as dpkg says."""
    return subprocess.run(["dpkg", "--compare-versions", version, "ge", other], check=False).returncode == 0


@cache
def _file() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text()))


def _number(version: Version) -> str:
    major, minor, patch, candidate = version
    return f"{major}.{minor}.{patch}" + (f"-rc.{candidate}" if candidate != FINAL else "")


def _package(program: str) -> Package | None:
    """The Debian package of a program, None for one that is of none."""
    release = platform.freedesktop_os_release()
    for path in _paths(program):
        try:
            owner = _output(["dpkg-query", "--search", path]).partition(":")[0]
            version = _output(["dpkg-query", "--show", "--showformat=${Version}", owner]) if owner else ""
        except FileNotFoundError:
            return None
        if version:
            files = [DOCUMENTS / owner / file for file in ("changelog.Debian.gz", "changelog.gz")]
            file = next((file for file in files if file.exists()), None)
            changelog = gzip.decompress(file.read_bytes()).decode(errors="replace") if file else ""
            return Package(owner, version, f"{release.get('ID')}-{release.get('VERSION_ID')}", changelog)
    return None


def _paths(name: str) -> Iterator[str]:
    """The program's path, as it is found and as a package from before /bin and /usr/bin became one may have it."""
    if path := shutil.which(name):
        yield path
        yield path.removeprefix("/usr") if path.startswith("/usr/") else f"/usr{path}"


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
