"""What is in the default image: the files in `images/`, the `beaker` command, and packages of this distribution.

Owns the key that changes with any of them, and making the base of packages with mmdebstrap, since a registry cannot be
counted on. Knows nothing of who keeps the image.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator

from . import host
from .environment import launcher

NAME = "beaker-sessions/base"
DIRECTORY = host.ROOT / "images"
LABEL = "beaker.recipe"
# The command line and what it imports: the standard library alone, so it runs in any image with a Python.
COMMAND = ("__init__.py", "errors.py", "client.py", "cli/*.py")
_INSIDE = "/usr/local/lib/beaker"


def key(base: str = "") -> str:
    """Changes with anything that the image is made of. base: the image that it starts from, "" for packages."""
    contents = [part for name, content in files() for part in (name.encode(), content)]
    return hashlib.sha256(b"\0".join([base.encode(), host.codename().encode(), *contents])).hexdigest()[:16]


def base_key() -> str:
    """Changes with the base of packages alone."""
    parts = (host.codename(), *packages(), (DIRECTORY / "dpkg.cfg").read_text())
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def files() -> Iterator[tuple[str, bytes]]:
    """What `install.sh` finds beside itself: path and content."""
    for path in sorted(DIRECTORY.iterdir()):
        yield path.name, path.read_bytes()
    package = host.ROOT / "beaker_sessions"
    for path in sorted(path for pattern in COMMAND for path in package.glob(pattern)):
        yield f"beaker/beaker_sessions/{path.relative_to(package)}", path.read_bytes()
    yield "beaker/launcher", launcher(_INSIDE, "/usr/bin/python3").encode()


def context() -> bytes:
    """The files as a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in files():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            member.mode = 0o755 if path == "beaker/launcher" else 0o644
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def packages() -> list[str]:
    lines = (DIRECTORY / "packages.txt").read_text().splitlines()
    return [name for line in lines for name in line.partition("#")[0].split()]


def bootstrap(target: str, sources: list[str]) -> list[str]:
    """The command that writes the base as a tar. target: a path, `-` for standard output."""
    arguments = [f"--include={','.join(packages())}", f"--dpkgopt={DIRECTORY / 'dpkg.cfg'}", "--format=tar"]
    return ["mmdebstrap", "--variant=minbase", *arguments, host.codename(), target, *sources]
