"""The root file system of a sandbox: an overlay on the image's layers, with the caller in its account files.

Owns: what is mounted and written between the image and the start. Everything is written through descriptors below the
root, so that no link of a hostile image leads out of it. The mounts are of this mount namespace and for a moment only:
once the runtime has made the container, which has its own copies, they are unmounted, and nothing is left to leak.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...errors import Error
from .. import Mount, Spec, identity
from . import mounts
from .config import INSIDE
from .images import Description
from .mounts import IdMap
from .userns import outside

SUDOERS = "/etc/sudoers.d"  # there is no password to ask for, and root inside is nobody outside
NOTHING = mounts.ATTR_NOSUID | mounts.ATTR_NODEV


def make(
    spec: Spec,
    root: Path,
    base: Path,
    image: Description,
    uids: IdMap,
    gids: IdMap,
    userns: int,
    *,
    inside: Path,
    resolvers: str,
) -> None:
    """Mount and fill the root file system at root; its writable layer is `upper` in base, which is there.

    inside: the directory that the sandbox sees as INSIDE. resolvers: the text of resolv.conf.
    Raises Error not_found for a mount whose source is gone, OSError otherwise.
    """
    owner = outside(uids, 0), outside(gids, 0)
    root.mkdir()
    for path in (root, base / "upper", base / "work"):
        path.chmod(0o755)
    os.chown(base / "upper", *owner)
    mounts.overlay(root, [Path(layer) for layer in image.layers], base, userns)
    with mounts.opened(os.open(root, os.O_PATH | os.O_CLOEXEC)) as top:
        with mounts.opened(mounts.make(top, "/etc", owner, directory=True)) as etc:
            for name, (text, mode) in _files(spec, image, resolvers).items():
                _write(etc, name, text, mode, owner)
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            mounts.opened(mounts.open_in(top, SUDOERS, os.O_PATH | os.O_DIRECTORY)) as sudoers,
        ):
            _write(sudoers, "beaker", f"#{spec.identity.uid} ALL=(ALL:ALL) NOPASSWD: ALL\n", 0o440, owner)
        for mount in _binds(spec, inside):
            _bind(top, mount, owner)
        attributes = NOTHING | mounts.ATTR_RDONLY | mounts.ATTR_NOEXEC
        with (
            mounts.opened(mounts.clone("/sys", attributes=attributes)) as tree,
            mounts.opened(mounts.make(top, "/sys", owner, directory=True)) as point,
        ):
            mounts.attach(tree, point)


def _files(spec: Spec, image: Description, resolvers: str) -> Mapping[str, tuple[str, int]]:
    return {
        "passwd": (identity.passwd(image.passwd, spec.identity, image.shell), 0o644),
        "group": (identity.group(image.group, spec.identity), 0o644),
        "shadow": (identity.shadow(image.shadow, spec.identity), 0o640),
        "hosts": (identity.hosts(spec.hostname), 0o644),
        "hostname": (spec.hostname + "\n", 0o644),
        "resolv.conf": (resolvers, 0o644),
    }


def _write(directory: int, name: str, text: str, mode: int, owner: tuple[int, int]) -> None:
    """A regular file with this text; one that the image has keeps its owner and mode, anything else makes way."""
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        kept = stat.S_ISREG(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
        if not kept:
            os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        kept = False
    with open(
        os.open(name, flags | (os.O_TRUNC if kept else os.O_CREAT | os.O_EXCL), mode, dir_fd=directory), "wb"
    ) as f:
        if not kept:
            os.fchown(f.fileno(), *owner)
        f.write(text.encode("utf-8", "surrogateescape"))


def _binds(spec: Spec, inside: Path) -> Iterator[Mount]:
    yield Mount(str(inside), INSIDE, read_only=True)
    yield from spec.mounts


def _bind(top: int, mount: Mount, owner: tuple[int, int]) -> None:
    attributes = NOTHING | (mounts.ATTR_RDONLY if mount.read_only else 0)
    try:
        tree = mounts.clone(mount.source, attributes=attributes, recursive=True)
    except FileNotFoundError as error:
        raise Error("not_found", f"{mount.source} for {mount.target} does not exist") from error
    with mounts.opened(tree):
        directory = stat.S_ISDIR(os.fstat(tree).st_mode)
        try:
            point = mounts.make(top, mount.target, owner, directory=directory)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            why = "a link of the image leads into another mount"
            raise Error(
                "invalid", f"{mount.target} cannot be mounted: {why}", "choose another path or image"
            ) from error
        with mounts.opened(point):
            mounts.attach(tree, point)
