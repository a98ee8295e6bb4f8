"""The default image, from the recipe in `images/`: keyed by its content, so that it is built once.

Without a base image, the base is made here of Debian (Ubuntu) packages with mmdebstrap, since a registry cannot be
counted on. On top of either goes `images/Dockerfile`. The key is the image's label `beaker.recipe`.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import threading
from collections import deque
from collections.abc import Iterator
from urllib.parse import urlencode

from . import engine, host
from .environment import launcher
from .sources import sources
from .steps import Failed, Report, Step

NAME = "beaker-sessions/base"
RECIPE = host.ROOT / "images"
LABEL = "beaker.recipe"
# The command line and what it imports: the standard library alone, so it runs in any image with a Python.
COMMAND = ("__init__.py", "errors.py", "client.py", "cli/*.py")
_INSIDE = "/usr/local/lib/beaker"
_STAMP = host.RUN / "setup/image"  # for users who may not ask the engine; gone with a reboot


def step(base: str = "", name: str = NAME) -> Step:
    title = "default image" if name == NAME else f"image {name}"
    return Step(title, lambda: not _current(name, _key(base)), lambda report: _build(base, name, report))


def _current(name: str, key: str) -> bool:
    try:
        return _label(name) == key
    except PermissionError:
        return _STAMP.exists() and _STAMP.read_text() == key
    except OSError:
        return False


def _label(name: str) -> str | None:
    status, image = engine.call("GET", f"/images/{name}/json")
    return (image["Config"].get("Labels") or {}).get(LABEL) if status == 200 else None


def _key(base: str) -> str:
    return hashlib.sha256(b"\0".join([base.encode(), host.codename().encode(), *_contents()])).hexdigest()[:16]


def _contents() -> Iterator[bytes]:
    for name, content in _files():
        yield from (name.encode(), content)


def _files() -> Iterator[tuple[str, bytes]]:
    """The build context: path and content."""
    for path in sorted(RECIPE.iterdir()):
        yield path.name, path.read_bytes()
    package = host.ROOT / "beaker_sessions"
    for path in sorted(path for pattern in COMMAND for path in package.glob(pattern)):
        yield f"beaker/beaker_sessions/{path.relative_to(package)}", path.read_bytes()
    yield "beaker/launcher", launcher(_INSIDE, "/usr/bin/python3").encode()


def _build(base: str, name: str, report: Report) -> str:
    key = _key(base)
    status, former = engine.call("GET", f"/images/{name}/json")
    if _label(name) != key:  # else only the stamp was missing
        started = base or _bootstrap(report)
        parameters = {
            "t": name,
            "rm": 1,
            "forcerm": 1,
            "buildargs": json.dumps({"BASE": started}),
            "labels": json.dumps({LABEL: key}),
            "networkmode": "bridge" if base else "none",
        }
        for event in engine.stream("POST", f"/build?{urlencode(parameters)}", _context()):
            report(event.get("stream") or event.get("status") or "")
        if status == 200:
            engine.call("DELETE", f"/images/{former['Id']}")  # refused, and rightly, while a session runs from it
    _, image = engine.call("GET", f"/images/{name}/json")
    if name == NAME:
        host.write(_STAMP, key)
    return f"{name}, {image['Size'] / 1e6:.0f} MB"


def _context() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path, content in _files():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            member.mode = 0o755 if path == "beaker/launcher" else 0o644
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def packages() -> list[str]:
    lines = (RECIPE / "packages.txt").read_text().splitlines()
    return [name for line in lines for name in line.partition("#")[0].split()]


def _bootstrap(report: Report) -> str:
    """The base of Debian packages, made unless it is there: its name."""
    parts = (host.codename(), *packages(), (RECIPE / "dpkg.cfg").read_text())
    name = f"{NAME}:{host.codename()}-{hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"
    if engine.call("GET", f"/images/{name}/json")[0] == 200:
        return name
    arguments = [f"--include={','.join(packages())}", f"--dpkgopt={RECIPE / 'dpkg.cfg'}", "--format=tar"]
    argv = ["mmdebstrap", "--variant=minbase", *arguments, host.codename(), "-", *sources()]
    said: deque[str] = deque(maxlen=20)
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        reader = threading.Thread(target=_follow, args=(process.stderr, said, report))
        reader.start()
        blocks = iter(lambda: process.stdout.read(1 << 20), b"")  # type: ignore[union-attr]
        # Untagged until mmdebstrap has succeeded: a tar that ends early would be an image too.
        events = list(engine.stream("POST", "/images/create?fromSrc=-", blocks))
        reader.join()
    if process.returncode:
        engine.call("DELETE", f"/images/{events[-1]['status']}")
        raise Failed(f"mmdebstrap ended with {process.returncode}", said)
    repository, tag = name.rsplit(":", 1)
    engine.call("POST", f"/images/{events[-1]['status']}/tag?{urlencode({'repo': repository, 'tag': tag})}")
    return name


def _follow(stream: io.BufferedReader, said: deque[str], report: Report) -> None:
    for line in io.TextIOWrapper(stream, errors="replace"):
        text = line.rpartition("\r")[2].strip()
        said.append(text)
        report(text)
