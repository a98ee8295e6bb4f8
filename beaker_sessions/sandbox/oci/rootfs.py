"""The root file system of a sandbox: an overlay on the image's layers, with the caller in its account files.

Owns: what is mounted and written between the image and the start. Everything is written through descriptors below the
root, so that no link of a hostile image leads out of it. The mounts are in a mount namespace of their own, which only
the runtime enters, to make the container: no path of this machine leads to them, and they go with that namespace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ...errors import Error
from .. import Mount, Spec, cdi, identity
from . import mounts
from .config import INSIDE
from .images import Description
from .mounts import IdMap
from .userns import outside

NAMES = ("hosts", "hostname", "resolv.conf")  # get their usual mode, whatever the image's is
SUDOERS = "/etc/sudoers.d"  # there is no password to ask for, and root inside is nobody outside
NOTHING = mounts.ATTR_NOSUID | mounts.ATTR_NODEV
READ = mounts.ATTR_RDONLY | mounts.ATTR_NOEXEC
OPTIONS = {"ro": mounts.ATTR_RDONLY, "nosuid": mounts.ATTR_NOSUID, "nodev": mounts.ATTR_NODEV,
           "noexec": mounts.ATTR_NOEXEC}  # fmt: skip
# Directories of every root, and their modes where an image has something else there, or nothing.
REAL = {"dev": 0o755, "proc": 0o755, "sys": 0o755, "run": 0o755, "tmp": 0o1777, INSIDE.strip("/"): 0o755}


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
    devices: Iterable[cdi.CdiMount] = (),
) -> int:
    """Mount and fill the root file system; the descriptor of the mount namespace in which it is, at root.

    root: an empty directory, which stays so. base: where `upper` is, its writable layer. inside: the directory that
    the sandbox sees as INSIDE. resolvers: the text of resolv.conf. devices: files of the machine that its GPUs need.
    Raises Error not_found for a mount whose source is gone, OSError otherwise.
    """
    owner = outside(uids, 0), outside(gids, 0)
    for path in (base / "upper", base / "work"):
        path.chmod(0o755)
    os.chown(base / "upper", *owner)
    with contextlib.ExitStack() as stack:
        # Before, because a descriptor of a source leads to it in this mount namespace alone.
        trees = [(mount.target, stack.enter_context(mounts.opened(_clone(mount)))) for mount in _binds(spec, inside)]
        trees += [(each.container_path, stack.enter_context(mounts.opened(_device(each)))) for each in devices]

        def fill() -> int:
            mounts.overlay(root, [Path(layer) for layer in image.layers], base, userns)
            with mounts.opened(os.open(root, os.O_PATH | os.O_CLOEXEC)) as top:
                for name, mode in REAL.items():
                    _real(top, name, mode, owner)
                _write_files(spec, top, image, resolvers, owner)
                for target, tree in trees:
                    _attach(top, target, tree, owner)
                with (
                    mounts.opened(mounts.clone("/sys", attributes=NOTHING | READ)) as tree,
                    mounts.opened(mounts.open_in(top, "/sys", os.O_PATH)) as point,
                ):
                    mounts.attach(tree, point)
            return mounts.namespace()

        return mounts.private(fill)


def _real(top: int, name: str, mode: int, owner: tuple[int, int]) -> None:
    """A directory of the root itself, in place of whatever else the image has there.

    Runtimes mount there, and write what they need into it: through a link that would be somewhere else, such as in a
    home (CVE-2026-41579).
    """
    try:
        if stat.S_ISDIR(os.stat(name, dir_fd=top, follow_symlinks=False).st_mode):
            return
        os.unlink(name, dir_fd=top)
    except FileNotFoundError:
        pass
    os.mkdir(name, dir_fd=top)
    os.chmod(name, mode, dir_fd=top)
    os.chown(name, *owner, dir_fd=top)


def _write_files(spec: Spec, top: int, image: Description, resolvers: str, owner: tuple[int, int]) -> None:
    with mounts.opened(mounts.make(top, "/etc", owner, directory=True)) as etc:
        for name, (text, mode) in _files(spec, image, resolvers).items():
            _write(etc, name, text, mode, owner)
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        mounts.opened(mounts.open_in(top, SUDOERS, os.O_PATH | os.O_DIRECTORY)) as sudoers,
    ):
        _write(sudoers, "beaker", f"#{spec.identity.uid} ALL=(ALL:ALL) NOPASSWD: ALL\n", 0o440, owner)


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
    """A regular file with this text; one that the image has keeps its owner, and the mode of accounts' files.

    Anything else makes way.
    """
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
        elif name in NAMES:
            os.fchmod(f.fileno(), mode)
        f.write(text.encode("utf-8", "surrogateescape"))


def _binds(spec: Spec, inside: Path) -> Iterator[Mount]:
    yield Mount(str(inside), INSIDE, read_only=True)
    yield from spec.mounts


def _clone(mount: Mount) -> int:
    attributes = NOTHING | (mounts.ATTR_RDONLY if mount.read_only else 0)
    try:
        return mounts.clone(mount.source, attributes=attributes, recursive=True)
    except FileNotFoundError as error:
        raise Error("not_found", f"{mount.source} for {mount.target} does not exist") from error


def _device(mount: cdi.CdiMount) -> int:
    attributes = sum(OPTIONS.get(option, 0) for option in set(mount.options))
    try:
        return mounts.clone(mount.host_path, attributes=attributes, recursive=True)
    except FileNotFoundError as error:
        raise Error("unavailable", f"{mount.host_path}, which a GPU needs, does not exist") from error


def _attach(top: int, target: str, tree: int, owner: tuple[int, int]) -> None:
    try:
        point = mounts.make(top, target, owner, directory=stat.S_ISDIR(os.fstat(tree).st_mode))
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        why = "a link of the image leads into another mount"
        raise Error("invalid", f"{target} cannot be mounted: {why}", "choose another path or image") from error
    with mounts.opened(point):
        mounts.attach(tree, point)
