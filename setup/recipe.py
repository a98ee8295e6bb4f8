"""What is in the default image: the files in `images/`, the `beaker` command, and packages of this distribution.

Owns the keys that change with any of them, and making the base of packages with mmdebstrap, since a registry cannot be
counted on. Three layers, of which what changes most often comes last: `base` is of packages, `tools` has what is not
the distribution's, `command` is ours. Knows nothing of who keeps the image.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from . import host
from .environment import launcher
from .steps import Failed, Report, command

NAME = "beaker-sessions/base"
DIRECTORY = host.ROOT / "images"
LABEL = "beaker.recipe"
LAYERS = ("base", "tools", "command")
LEFT_OUT = "left out: "  # how a script of a layer begins to say what could not be had
# The command line and what it imports: the standard library alone, so it runs in any image with a Python.
COMMAND = ("__init__.py", "errors.py", "client.py", "transport.py", "cli/*.py")
_INSIDE = "/usr/local/lib/beaker"


class Listener:
    """A Report that passes everything on, and remembers what was said to be left out."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.found: list[str] = []

    def __call__(self, text: str) -> None:
        if text.startswith(LEFT_OUT):
            self.found.append(text)
        self._report(text)

    def left_out(self) -> str:
        """To put after the image's size."""
        return "".join(f"; {text}" for text in self.found)


def key(base: str = "") -> str:
    """Changes with anything that the image is made of. base: the image that it starts from, "" for packages."""
    contents = [part for layer in LAYERS for name, content in files(layer) for part in (name.encode(), content)]
    dockerfile = (DIRECTORY / "Dockerfile").read_bytes()
    return hashlib.sha256(b"\0".join([base.encode(), host.codename().encode(), dockerfile, *contents])).hexdigest()[:16]


def base_key() -> str:
    """Changes with the base of packages alone."""
    parts = (host.codename(), *packages(), (DIRECTORY / "base/dpkg.cfg").read_text())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def tools_key() -> str:
    """Changes with the base and the tools on it."""
    parts = [part for name, content in files("tools") for part in (name.encode(), content)]
    return hashlib.sha256(b"\0".join([base_key().encode(), *parts])).hexdigest()[:12]


def files(layer: str) -> Iterator[tuple[str, bytes]]:
    """What the `install.sh` of a layer finds beside itself: path and content."""
    for path in sorted((DIRECTORY / layer).iterdir()):
        yield path.name, path.read_bytes()
    if layer == "command":
        package = host.ROOT / "beaker_sessions"
        for path in sorted(path for pattern in COMMAND for path in package.glob(pattern)):
            yield f"beaker/beaker_sessions/{path.relative_to(package)}", path.read_bytes()
        yield "beaker/launcher", launcher(_INSIDE, "/usr/bin/python3").encode()


def programs(report: Report, python: Path) -> dict[str, bytes]:
    """Those that are copied into the image as they are: name and content; empty where PyPI cannot be reached.

    python: one with pip.
    """
    report("downloading uv")
    with tempfile.TemporaryDirectory() as name:
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        options = ["--only-binary=:all:", "--require-hashes", "--progress-bar=off", "--dest", name]
        try:
            command([*pip, *options, "--requirement", str(DIRECTORY / "tools/uv.txt")], report)
        except Failed:
            report(f"{LEFT_OUT}uv (nothing could be downloaded from PyPI)")
            return {}
        (wheel,) = Path(name).iterdir()
        with zipfile.ZipFile(wheel) as archive:  # https://packaging.python.org, "Binary distribution format"
            scripts = [path for path in archive.namelist() if ".data/scripts/" in path]
            return {Path(path).name: archive.read(path) for path in scripts}


def context(programs: dict[str, bytes]) -> bytes:
    """The files as a tar, for `images/Dockerfile`."""
    found = {f"{layer}/{path}": content for layer in LAYERS for path, content in files(layer)}
    found |= {f"bin/{name}": content for name, content in programs.items()}
    found["Dockerfile"] = (DIRECTORY / "Dockerfile").read_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        folder = tarfile.TarInfo("bin")  # there even if empty
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        for path, content in found.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            member.mode = 0o755 if path.startswith("bin/") else 0o644
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def packages() -> list[str]:
    """The packages of the base; of those that not every distribution has, the ones that this machine's has."""
    sure, perhaps = _listed()
    return sure + [name for name in perhaps if _offered(name)]


def lacking(report: Report) -> None:
    """Say which of them this machine's distribution has not."""
    for name in sorted({*_listed()[1]} - {*packages()}):
        report(f"{LEFT_OUT}{name} (this distribution has none)")


def _listed() -> tuple[list[str], list[str]]:
    lines = [line.partition("#")[0].strip() for line in (DIRECTORY / "base/packages.txt").read_text().splitlines()]
    sure = [name for line in lines if not line.startswith("?") for name in line.split()]
    return sure, [line[1:] for line in lines if line.startswith("?")]


def _offered(package: str) -> bool:
    """Whether the distribution has a package, as far as apt's lists say."""
    done = subprocess.run(["apt-cache", "show", "--no-all-versions", package], capture_output=True)
    return done.returncode == 0 and bool(done.stdout)


def bootstrap(target: str, sources: list[str]) -> list[str]:
    """The command that writes the base as a tar. target: a path, `-` for standard output."""
    arguments = [f"--include={','.join(packages())}", f"--dpkgopt={DIRECTORY / 'base/dpkg.cfg'}", "--format=tar"]
    return ["mmdebstrap", "--variant=minbase", *arguments, host.codename(), target, *sources]
