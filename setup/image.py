"""The default image, kept where the driver looks: in the executor's own storage, or in Docker Engine.

Keyed by its recipe, so that it is made once. With a base image of someone else's it is always Docker Engine that builds
it, from `images/Dockerfile`; the executor takes it from there.
"""

from __future__ import annotations

import io
import json
import subprocess
import threading
from collections import deque
from urllib.parse import urlencode

from . import archive, driver, engine, host, recipe
from .recipe import LABEL, NAME
from .sources import sources
from .steps import Failed, Report, Step

_STAMP = host.RUN / "setup/image"  # for users who may not ask the engine; gone with a reboot


def step() -> Step:
    """The default image, for the driver of this machine."""

    def missing() -> bool:
        return not _current(NAME, recipe.key()) if driver.name() == "docker" else not archive.current()

    return Step(
        "default image", missing, lambda r: _build("", NAME, r) if driver.name() == "docker" else archive.make(r)
    )


def step_on(base: str, name: str) -> Step:
    """The same on another base, in Docker Engine."""
    return Step(f"image {name}", lambda: not _current(name, recipe.key(base)), lambda r: _build(base, name, r))


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


def _build(base: str, name: str, report: Report) -> str:
    key = recipe.key(base)
    listener = recipe.Listener(report)
    status, former = engine.call("GET", f"/images/{name}/json")
    if _label(name) != key:  # else only the stamp was missing
        started = base or _bootstrap(listener)
        parameters = {
            "t": name,
            "rm": 1,
            "forcerm": 1,
            "buildargs": json.dumps({"BASE": started}),
            "labels": json.dumps({LABEL: key}),
            "networkmode": "host",  # a bridge need not be there
        }
        context = recipe.context(recipe.programs(listener))
        for event in engine.stream("POST", f"/build?{urlencode(parameters)}", context):
            for line in (event.get("stream") or event.get("status") or "").splitlines():
                listener(line)
        if status == 200:
            engine.call("DELETE", f"/images/{former['Id']}")  # refused, and rightly, while a session runs from it
    _, image = engine.call("GET", f"/images/{name}/json")
    if name == NAME:
        host.write(_STAMP, key)
    return f"{name}, {image['Size'] / 1e6:.0f} MB{listener.left_out()}"


def _bootstrap(report: Report) -> str:
    """The base of Debian packages, made unless it is there: its name."""
    name = f"{NAME}:{host.codename()}-{recipe.base_key()}"
    if engine.call("GET", f"/images/{name}/json")[0] == 200:
        return name
    recipe.lacking(report)
    argv = recipe.bootstrap("-", sources())
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
