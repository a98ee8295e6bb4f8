"""`executor images`: what images this machine has, for its administrators."""

from __future__ import annotations

import os

from ..errors import Error
from . import codec, config, door, output
from .args import Flag, Options, command

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

HEADING = ("IMAGE", "ID", "SIZE", "LAST USED", "NEEDED")
PATIENCE = 3600.0  # seconds that a large archive may take


@command(
    "[list | load FILE NAME | prune]",
    Flag("older-than", "text", "prune: images that were not used for so long", value="30d"),
    Flag("keep", "text", "prune: as many as it takes until images fill no more than this", value="50GiB"),
    words=(0, 3),
)
def images(options: Options) -> int:
    action, *words = options.words or ["list"]
    if action not in ("list", "load", "prune") or len(words) != (2 if action == "load" else 0):
        raise Error("invalid", f"images: cannot do {' '.join(options.words)!r}", "list, load FILE NAME, or prune")
    if action != "prune" and (options["older-than"] or options["keep"]):
        raise Error("invalid", f"--older-than and --keep are not for {action}", "leave them out")
    token = config.load().token
    if action == "load":
        found = list(_load(token, *words))
    else:
        limits = {"olderThan": options["older-than"], "keep": options["keep"]}
        frames = door.ask_all("images", token, PATIENCE, action=action, **limits)
        found = [frame["image"] for frame in frames]
    if options.json:
        output.json(found)
    elif options.quiet:
        for image in found:
            output.line(image["id"])
    elif action == "list":
        output.table(HEADING, [_row(image) for image in found])
    else:
        for image in found:
            what = "loaded" if action == "load" else "removed"
            output.line(f"{what} {_name(image)}, {output.size(image['size'])}")
    return 0


def _load(token: str, file: str, name: str) -> Iterator[dict[str, Any]]:
    """Hand the open file over: the executor reads what the caller may read, not what it may read itself."""
    import socket

    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Error("not_found", f"{file}: {error.strerror}", "give an OCI or Docker archive") from None
    connection = door.Door()
    try:
        request = codec.dumps(door.request("images", token, action="load", name=name)).encode()
        with socket.socket(fileno=os.dup(connection.fileno())) as own:
            socket.send_fds(own, [request], [descriptor])
        while True:
            frame, _ = connection.answer(PATIENCE)
            if frame.get("end"):
                return
            yield frame["image"]
    except door.Away:
        raise Error("unavailable", "the executor went away before it answered", "try again") from None
    finally:
        connection.close()
        os.close(descriptor)


def _name(image: dict[str, Any]) -> str:
    return ", ".join(image["names"]) or "(no name)"


def _row(image: dict[str, Any]) -> tuple[Any, ...]:
    short = image["id"].rpartition(":")[2][:12]
    return _name(image), short, output.size(image["size"]), image["used"][:16].replace("T", " "), image["needed"]
