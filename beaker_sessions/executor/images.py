"""The images of this node, for its administrators: listed, loaded from an archive, removed when not needed.

Owns which images are needed: those of live sessions, and the default. Who may ask is the door's business.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from .. import grammar
from ..errors import Error
from ..sandbox import Limits
from ..settings import ExecutorSettings
from . import plan
from .caller import Caller
from .lifecycle import Lifecycle

FRESH = timedelta(minutes=1)  # a session that is just starting may have it, though its name means another by now


class Stored(Protocol):
    """An image on this machine. names: in full. size: bytes."""

    @property
    def id(self) -> str: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def size(self) -> int: ...
    @property
    def used(self) -> datetime: ...


class Store(Protocol):
    """The images of a driver that keeps its own."""

    def load(self, archive: Path, reference: str) -> None: ...
    def stored(self) -> Sequence[Stored]: ...
    def id(self, reference: str) -> str: ...
    def remove(self, id: str) -> bool: ...

    needed: Callable[[], set[str]] | None


def answer(caller: Caller, request: dict[str, Any], lifecycle: Lifecycle) -> Iterator[dict[str, Any]]:
    """The answers to the door's `images`: `action` is list, load or prune (docs/architecture.md, "The door")."""
    store = _store(lifecycle)
    if store is None:
        raise Error("conflict", "images of this node are kept by Docker Engine", "docker image list")
    match request.get("action"):
        case "list":
            pinned = needed(store, lifecycle)
            for image in store.stored():
                yield {"image": {**_json(image), "needed": image.id in pinned}}
        case "load":
            yield {"image": _load(caller, str(request.get("name")), store)}
        case "prune":
            older, keep = (
                _limit(request, "olderThan", grammar.parse_duration),
                _limit(request, "keep", grammar.parse_size),
            )
            for image in surplus(store.stored(), needed(store, lifecycle), older, keep, datetime.now(UTC)):
                if store.remove(image.id):  # else somebody has begun to use it since
                    yield {"image": _json(image)}
        case action:
            raise Error("invalid", f"images: {action!r} is none of list, load, prune", "choose one of them")
    yield {"end": True}


def limits(settings: ExecutorSettings) -> Limits:
    """How much of the disk images may take. Raises Error invalid."""
    sizes = []
    for key, text in (("imageSize", settings.image_size), ("imageSpace", settings.image_space)):
        try:
            sizes.append(grammar.parse_size(text) if text else 0)
        except ValueError as error:
            raise Error("invalid", f"{key}: {error}", "correct the settings") from error
    return Limits(*sizes)


def guard(lifecycle: Lifecycle) -> None:
    """Let the driver make room for new images, now that it can be told which are needed."""
    if (store := _store(lifecycle)) is not None:
        store.needed = lambda: needed(store, lifecycle)


def _store(lifecycle: Lifecycle) -> Store | None:
    return getattr(lifecycle.sandboxes, "images", None)


def needed(store: Store, lifecycle: Lifecycle) -> set[str]:
    """The ids of images that must stay."""
    references = {session.request.image for session in lifecycle.sessions.live()} | {lifecycle.settings.default_image}
    now = datetime.now(UTC)
    return (
        {store.id(reference) for reference in references if reference}
        | {found.labels.get(plan.LABEL_IMAGE, "") for found in lifecycle.sandboxes.list()}
        | {image.id for image in store.stored() if not image.names and now - image.used < FRESH}
    )


def surplus(
    stored: Sequence[Stored], needed: set[str], older: float | None, keep: float | None, now: datetime
) -> list[Stored]:
    """What to remove, the longest unused first.

    older: seconds since its last use after which an image goes, None for no matter. keep: bytes that images may fill,
    so that as many go as it takes. With neither, all that is not needed goes.
    """
    total, chosen = sum(image.size for image in stored), []
    for image in sorted(stored, key=lambda image: image.used):
        aged = older is not None and (now - image.used).total_seconds() > older
        if image.id not in needed and (aged or (keep is not None and total > keep) or older is keep is None):
            chosen.append(image)
            total -= image.size
    return chosen


def _load(caller: Caller, name: str, store: Store) -> dict[str, Any]:
    """Take the archive whose descriptor came with the request: who asks can read it, which a path would not show."""
    archive = caller.agent
    if archive < 0 or not stat.S_ISREG(os.fstat(archive).st_mode):
        what = "the archive is not a regular file, or its file system is a program of a user (FUSE)"
        raise Error("invalid", what, "copy it to a file of this machine first")
    store.load(Path(f"/proc/{os.getpid()}/fd/{archive}"), name)
    return next(_json(image) for image in store.stored() if image.id == store.id(name))


def _limit(request: dict[str, Any], name: str, parse: Any) -> float | None:
    value = request.get(name)
    try:
        return None if value is None else parse(value)
    except ValueError as error:
        flag = "--older-than" if name == "olderThan" else "--keep"
        raise Error("invalid", f"{flag}: {error}", "for example --older-than 30d --keep 50GiB") from None


def _json(image: Stored) -> dict[str, Any]:
    names = [name.removeprefix("docker.io/").removeprefix("library/") for name in image.names]
    return {"id": image.id, "names": names, "size": image.size, "used": image.used.isoformat()}
