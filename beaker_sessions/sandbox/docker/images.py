"""Images: found on this machine, pulled from a registry, and what their account files say.

Owns: references as Docker understands them, the progress of a pull, and the short-lived container through which an
image's files are read. Must not choose an image.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import posixpath
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import Error
from ...grammar import format_size
from ...model import Pull
from .. import LABEL_OWNER, Image, Login, Progress, free
from ..oci.reference import HUB, parse
from .engine import Engine
from .files import Files

SILENCE = 300.0  # seconds without a word after which a pull is given up
PAUSE = 0.1  # seconds between two reports of progress
STALE = 300  # seconds after which a reading container is a leftover
FULL = 256 << 20  # bytes of free space below which a failure is one of space
SHELLS = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh")
FINISHED = {"Already exists", "Pull complete"}


def get(
    engine: Engine, reference: str, pull: Pull, progress: Callable[[Progress], None], login: Login,
    going: Callable[[], None], limit: int,
) -> Image:  # fmt: skip
    """As `Sandboxes.image`. limit: bytes that an image which is pulled may take, 0 for no limit.

    The engine unpacks where we do not see how much, so what stops it is a disk that is nearly full; how large an image
    is shows afterwards.
    """
    reference = normalise(reference)
    local = None if pull is Pull.ALWAYS else _local(engine, reference)
    if local:
        return local
    if pull is Pull.NEVER:
        raise Error("not_found", f"the image {reference} is not on this machine, and --pull is never", "--pull missing")
    before = _local(engine, reference)
    _pull(engine, reference, progress, login, going)
    if found := _local(engine, reference):
        if limit and found.size > limit and not (before and before.id == found.id):
            engine.call("DELETE", f"/images/{reference}")
            what = f"the image {reference} was not taken: an image may take {format_size(limit)} (imageSize)"
            raise Error("storage_full", what, "use a smaller image, or ask the administrator")
        return found
    raise Error("not_found", f"the image {reference} was pulled and is gone again", "try again")


def normalise(reference: str) -> str:
    """`NAME:TAG` or `NAME@DIGEST`, without a scheme."""
    for scheme in ("docker://", "beaker://"):
        reference = reference.removeprefix(scheme)
    return reference if "@" in reference or ":" in reference.rpartition("/")[2] else reference + ":latest"


@dataclass(frozen=True)
class Accounts:
    """An image's passwd and group (None where it has none), and the path of its best shell."""

    passwd: str | None
    group: str | None
    shell: str


def accounts(engine: Engine, files: Files, id: str, owner: str) -> Accounts:
    """The account files of the image with this id, read out of it once."""
    facts = files.image(id)
    if facts is None:
        with _reading(engine, id, owner) as path:
            facts = {
                "passwd": _read(engine, path, "/etc/passwd"),
                "group": _read(engine, path, "/etc/group"),
                "shell": next((s for s in SHELLS if engine.exists(f"{path}/archive", {"path": s})), "/bin/sh"),
            }
        files.keep_image(id, facts)
    return Accounts(**facts)


def check_targets(engine: Engine, files: Files, id: str, owner: str, targets: Iterable[str]) -> None:
    """Raises Error invalid when links of the image lead one mount into another.

    The engine makes missing mount points as root, and would make them in what is mounted there already.
    """
    known: dict[str, str] = files.image(f"{id}-paths") or {}
    wanted = {posixpath.normpath(target) for target in targets}
    if missing := wanted - known.keys():
        with _reading(engine, id, owner) as container:
            known |= {path: _real(engine, container, path) for path in missing}
        files.keep_image(f"{id}-paths", known)
    for target in wanted:
        for other in wanted - {target}:
            if _below(known[target], known[other]) and not _below(target, other):
                why = f"a link of the image leads it into {other}"
                raise Error("invalid", f"{target} cannot be mounted: {why}", "choose another path or image")


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _real(engine: Engine, container: str, path: str) -> str:
    """Where a path of an image leads; what does not exist leads to itself."""
    at, parts = "", path.strip("/").split("/")
    for number, part in enumerate(parts):
        found = engine.stat(container, f"{at}/{part}")
        if found is None:
            return "/".join([at, *parts[number:]])
        at = found["linkTarget"].rstrip("/") if found["linkTarget"] else f"{at}/{part}"
    return at or "/"


@contextlib.contextmanager
def _reading(engine: Engine, id: str, owner: str) -> Iterator[str]:
    """The API's path of a container that shows the files of an image, and never runs."""
    body = {"Image": id, "Cmd": ["none"], "Labels": {LABEL_OWNER: owner}, "HostConfig": {"NetworkMode": "none"}}
    path = f"/containers/{engine.call('POST', '/containers/create', body=body)['Id']}"
    try:
        yield path
    finally:
        engine.call("DELETE", path, {"force": 1, "v": 1})


def forget(engine: Engine, container: Mapping[str, Any]) -> None:
    """Remove a reading container, as listed by the engine, whose executor was killed before it could."""
    if time.time() - container["Created"] > STALE:
        engine.call("DELETE", f"/containers/{container['Id']}", {"force": 1, "v": 1})


def full(engine: Engine) -> str:
    """The engine's directory if its disk is as good as full, else "": the engine has no status of its own for that."""
    root: str = engine.call("GET", "/info")["DockerRootDir"]
    if os.path.isdir(root) and (disk := os.statvfs(root)).f_bavail * disk.f_frsize < FULL:
        return root
    return ""


def _local(engine: Engine, reference: str) -> Image | None:
    try:
        found = engine.call("GET", f"/images/{reference}/json")
    except Error as error:
        if error.code == "not_found":
            return None
        raise
    env = (found["Config"] or {}).get("Env") or ()  # an image may be without
    return Image(found["Id"], reference, tuple(env), found["Size"])


def _read(engine: Engine, container: str, path: str) -> str | None:
    try:
        archive = engine.read(f"{container}/archive", {"path": path})
    except Error as error:
        if error.code == "not_found":
            return None
        raise
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        content = next((tar.extractfile(member) for member in tar if member.isreg()), None)
        return content.read().decode("utf-8", "surrogateescape") if content else None


def _pull(
    engine: Engine, reference: str, progress: Callable[[Progress], None], login: Login, going: Callable[[], None]
) -> None:
    name, separator, tag = reference.partition("@")
    if not separator:
        name, _, tag = reference.rpartition(":")
    layers: dict[str, dict[str, Any]] = {}
    reported = 0.0
    whole = parse(reference)
    known, headers = login(f"{whole.host}/{whole.path}"), {}
    if known:
        address = "https://index.docker.io/v1/" if whole.host == HUB else whole.host
        secret = json.dumps({"username": known[0], "password": known[1], "serveraddress": address})
        headers["X-Registry-Auth"] = base64.urlsafe_b64encode(secret.encode()).decode()
    query = {"fromImage": name, "tag": tag}
    try:
        root = engine.call("GET", "/info")["DockerRootDir"]

        def look() -> None:
            going()
            if os.path.isdir(root) and (why := free.lacks(root)):
                raise Error("storage_full", why)

        # Its first word comes after the registry's: until then there is no progress.
        events = engine.stream("POST", "/images/create", query, timeout=SILENCE, headers=headers, look=look)
        for event in events:
            if event and "errorDetail" in event:
                raise Error("unavailable", str(event["errorDetail"].get("message")))
            if event and _layer(layers, event) and time.monotonic() - reported > PAUSE:
                reported = time.monotonic()
                progress(_progress(layers))
    except Error as error:
        going()  # it ended because somebody stopped it
        raise _failure(engine, reference, error) from error
    if layers:
        progress(_progress(layers))


def _layer(layers: dict[str, dict[str, Any]], event: Mapping[str, Any]) -> bool:
    """Take one message of a pull into account; whether it was about a layer."""
    status, detail = event.get("status"), event.get("progressDetail")
    if detail is None or "id" not in event:
        return False
    layer = layers.setdefault(event["id"], {"done": 0, "total": 0, "finished": False})
    if detail.get("total"):
        # Downloading and extracting both count to the compressed size; the latter starts again from 0.
        layer |= {"done": max(layer["done"], detail["current"]), "total": detail["total"]}
    if status in FINISHED:
        layer |= {"done": layer["total"], "finished": True}
    return True


def _progress(layers: Mapping[str, Mapping[str, Any]]) -> Progress:
    values = layers.values()
    return Progress(
        sum(layer["done"] for layer in values),
        sum(layer["total"] for layer in values),
        (sum(layer["finished"] for layer in values), len(values)),
    )


def _failure(engine: Engine, reference: str, error: Error) -> Error:
    name = reference.partition("@")[0]
    first = name.split("/")[0]
    registry = first if "/" in name and ("." in first or ":" in first or first == "localhost") else "docker.io"
    tried = f"the image {reference} is not on this machine, and pulling it from {registry} failed: {error.message}"
    if error.code == "not_found":
        return Error("not_found", tried, f"check the name; a private image needs: docker login {registry}")
    if error.code != "internal":
        return Error(error.code, tried, error.hint)
    if root := full(engine):
        return Error("storage_full", tried, f"free space on the disk of {root}: docker system prune")
    # The engine has no status of its own for a registry that it cannot reach.
    return Error("unavailable", tried, f"check the way to {registry}; a private image needs: docker login {registry}")
