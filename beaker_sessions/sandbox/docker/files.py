"""The files of a sandbox on the host: its account files, its first program, its gates, and mounts by descriptor.

Owns: everything below one state directory: `ID/` for each sandbox, `images/` with what was read out of images. Only
root may write there; the sandbox sees its own `ID/inside/`, read-only. Must not talk to the engine.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ...errors import Error
from .. import Mount
from ..busybox import BUSYBOX

INSIDE = "inside"
PINNED = re.compile(r"/proc/\d+/fd/\d+")
MS_BIND, MS_REC, MS_SLAVE, MNT_DETACH = 4096, 16384, 1 << 19, 2  # mount(2), umount(2)

_libc = ctypes.CDLL(None, use_errno=True)


class Files:
    def __init__(self, state: Path) -> None:
        self.state = state

    def directory(self, id: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", id) or id == "images":
            raise Error("invalid", f"{id!r} is no session id")
        return self.state / id

    def create(self, id: str, passwd: str, group: str, mounts: Sequence[Mount]) -> list[Mount]:
        """Write the files of a new sandbox; the mounts with sources that any process of the host can open.

        Raises FileExistsError when there are such files already, Error unavailable without a static busybox. What it
        could not finish, it removes.
        """
        if not os.access(BUSYBOX, os.X_OK):
            raise Error("unavailable", f"{BUSYBOX} is missing", "make session")
        directory = self.directory(id)
        self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o700)
        try:
            (directory / INSIDE).mkdir()
            (directory / INSIDE).chmod(0o755)  # whatever our umask is
            shutil.copy(BUSYBOX, directory / INSIDE / "busybox")
            for name, text in (("passwd", passwd), ("group", group), (f"{INSIDE}/entry.sh", _entry())):
                (directory / name).write_text(text, "utf-8", "surrogateescape")
                (directory / name).chmod(0o644)
            return [self._stage(directory, number, mount) for number, mount in enumerate(mounts)]
        except BaseException:
            self.remove(id)
            raise

    def open_gate(self, id: str, name: str) -> None:
        (self.directory(id) / INSIDE / name).touch()

    def close_gate(self, id: str, name: str) -> None:
        (self.directory(id) / INSIDE / name).unlink(missing_ok=True)

    def release(self, id: str) -> None:
        """Drop the staged mounts: the container has its own copies once it has started."""
        for target in sorted(self.directory(id).glob("mount-*")):
            while _libc.umount2(os.fsencode(target), MNT_DETACH) == 0:
                pass
            # A mount that is still there would make this fail, rather than delete what is mounted.
            target.rmdir() if target.is_dir() else target.unlink()

    def remove(self, id: str) -> None:
        directory = self.directory(id)
        if not directory.exists():
            return
        self.release(id)
        for path in (*directory.glob(f"{INSIDE}/*"), *directory.glob("*")):
            path.rmdir() if path.is_dir() else path.unlink()
        directory.rmdir()

    def image(self, id: str) -> Any:
        """What was read out of an image earlier, None if nothing was. id: the engine's, with its `sha256:`."""
        try:
            return json.loads(self._image(id).read_text())
        except (OSError, ValueError):
            return None

    def keep_image(self, id: str, facts: Any) -> None:
        path = self._image(id)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}-{os.urandom(4).hex()}")
        temporary.write_text(json.dumps(facts))
        temporary.replace(path)

    def _image(self, id: str) -> Path:
        return self.state / "images" / f"{id.replace(':', '-').replace('/', '-')}.json"

    def _stage(self, directory: Path, number: int, mount: Mount) -> Mount:
        """The kernel binds only what is in the caller's own mount namespace, which for a container is a new one: a
        descriptor of ours means nothing there. So it is bound to a path of ours first, as a slave, lest unmounting it
        unmounts the original."""
        if not PINNED.fullmatch(mount.source):
            return mount
        target = directory / f"mount-{number}"
        target.mkdir() if os.path.isdir(mount.source) else target.touch()
        for source, flags in ((os.fsencode(mount.source), MS_BIND | MS_REC), (None, MS_SLAVE | MS_REC)):
            if _libc.mount(source, os.fsencode(target), None, flags, None) != 0:
                code = ctypes.get_errno()
                raise Error(
                    "not_found" if code == errno.ENOENT else "internal",
                    f"cannot bind {mount.source} for {mount.target}: {os.strerror(code)}",
                )
        return Mount(str(target), mount.target, mount.read_only, slave=_is_slave(target))


def _is_slave(target: Path) -> bool:
    """Whether a mount point receives what is mounted elsewhere: proc(5), `master` among the optional fields."""
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return any(
        field.startswith("master:") for line in lines if line[4] == str(target) for field in line[6 : line.index("-")]
    )


def _entry() -> str:
    return (resources.files("beaker_sessions.sandbox") / "entry.sh").read_text()
