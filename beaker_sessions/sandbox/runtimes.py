"""What is known of ways out of a container in an OCI runtime, for `executor doctor`.

A distribution mends old versions without giving them a new number, so its package is judged by the vulnerabilities that
its changelog names (Debian Policy 4.4, and Ubuntu's custom); what the changelog does not name is said to be unknown.
"""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import Finding

DOCUMENTS = Path("/usr/share/doc")
TRACKER = "https://security-tracker.debian.org/tracker/"
FINAL = 1 << 16  # of a version that is no release candidate
Version = tuple[int, int, int, int]  # major, minor, patch, release candidate


@dataclass(frozen=True)
class Flaw:
    """ids: CVEs mended together. fixed: the first version without them in each line of releases, in ascending order."""

    ids: tuple[str, ...]
    fixed: tuple[str, ...]

    def mended(self, version: Version) -> bool:
        """By the runtime's own authors."""
        firsts = [parse(text) for text in self.fixed]
        return version >= firsts[-1] or any(first[:2] == version[:2] and version >= first for first in firsts)


# From the advisories of github.com/opencontainers/runc and github.com/containers/crun; crun has none of runc's two.
KNOWN = {
    "runc": (
        Flaw(("CVE-2024-21626",), ("1.1.12",)),
        Flaw(("CVE-2025-31133", "CVE-2025-52565", "CVE-2025-52881"), ("1.2.8", "1.3.3", "1.4.0-rc.3")),
    ),
    "crun": (Flaw(("CVE-2022-27650",), ("1.4.4",)),),
}


def finding(name: str, text: str) -> Finding:
    """What doctor says of a runtime. name: of its program. text: what it, or its engine, says is its version."""
    version = parse(text)
    if not version:
        return Finding("warning", f"{name} does not tell its version", f"{name} --version")
    package, changelog = _package(name)
    what = f"{name} {_number(version)}" + (f" ({package})" if package else "")
    return judge(name, version, what, changelog)


def judge(name: str, version: Version, what: str, changelog: str | None) -> Finding:
    """The same from what was found out. what: the text for name and version. changelog: None for no package."""
    opened = [flaw for flaw in KNOWN.get(name, ()) if not flaw.mended(version)]
    unnamed = [id for flaw in opened for id in flaw.ids if id not in (changelog or "")]
    upstream = "; ".join(f"{', '.join(flaw.ids)} in {' and '.join(flaw.fixed)}" for flaw in opened)
    if not unnamed:
        mended = f": its package has mended {', '.join(id for flaw in opened for id in flaw.ids)}" if opened else ""
        return Finding("ok", what + (mended or ", without a vulnerability that is known here"))
    if changelog is None:
        what += f" is older than its mended versions: {upstream}"
        return Finding("warning", what, f"install a newer {name}, or the distribution's: apt-get install {name}")
    what += f": its package does not say that it has mended {', '.join(unnamed)}, and may be vulnerable or not"
    return Finding("warning", what, f"apt-get install --only-upgrade {name}; what is known: {TRACKER}{unnamed[0]}")


def parse(text: str) -> Version:
    """The first version in a text; () for none."""
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?(?:[-~]rc\.?(\d+))?", text)
    if not match:
        return ()  # type: ignore[return-value]
    major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch or 0), int(candidate or FINAL)


def _number(version: Version) -> str:
    major, minor, patch, candidate = version
    return f"{major}.{minor}.{patch}" + (f"-rc.{candidate}" if candidate != FINAL else "")


def _package(name: str) -> tuple[str, str | None]:
    """`package version` of the program's Debian package and its changelog, "" where that was left out to save space.

    ("", None) for a program that is of no package.
    """
    for path in _paths(name):
        try:
            owner = _output(["dpkg-query", "--search", path]).partition(":")[0]
            version = _output(["dpkg-query", "--show", "--showformat=${Version}", owner]) if owner else ""
        except FileNotFoundError:
            return "", None
        if version:
            files = [DOCUMENTS / owner / file for file in ("changelog.Debian.gz", "changelog.gz")]
            file = next((file for file in files if file.exists()), None)
            return f"{owner} {version}", gzip.decompress(file.read_bytes()).decode(errors="replace") if file else ""
    return "", None


def _paths(name: str) -> Iterator[str]:
    """The program's path, as it is found and as a package from before /bin and /usr/bin became one may have it."""
    if path := shutil.which(name):
        yield path
        yield path.removeprefix("/usr") if path.startswith("/usr/") else f"/usr{path}"


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
