"""Images in containers-storage: found, fetched, and described once each.

Owns: one storage of the executor's own (its layers and their order, as containers/storage keeps them for the overlay
driver), and a small description of each image, so that nothing but the description is read when a session starts. The
work of fetching is skopeo's. Must not choose an image.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import Error
from ...model import Pull
from .. import Image, Progress
from . import mounts
from .reference import Reference, parse

SHELLS = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh")
PAUSE = 0.1  # seconds between two reports of progress
LONGEST = 4 << 20  # bytes of an account file
ACCOUNTS = ("passwd", "group", "shadow")


@dataclass(frozen=True)
class Description:
    """layers: directories, topmost first. env: `NAME=value`. passwd, group, shadow: the image's texts, or None."""

    id: str
    layers: list[str]
    env: list[str]
    size: int
    shell: str
    passwd: str | None
    group: str | None
    shadow: str | None


class Images:
    """root: a directory of the executor's own. docker: the socket of the local Docker Engine, "" for none."""

    def __init__(self, root: Path, docker: str = "") -> None:
        self.root, self.docker = root, docker
        self.storage = root / "storage"
        self._lock = threading.Lock()

    def get(self, reference: str, pull: Pull, progress: Callable[[Progress], None]) -> Image:
        """As `Sandboxes.image`."""
        wanted = parse(reference)
        with self._lock:
            if pull is Pull.ALWAYS or not (id := self._find(wanted)):
                id = self._fetch(wanted, pull, progress)
        description = self.describe(id)
        return Image(description.id, reference, tuple(description.env), description.size)

    def load(self, archive: Path, reference: str) -> None:
        """Take an image from an OCI or Docker archive file, under a name."""
        kind = "oci-archive" if tarfile.is_tarfile(archive) and _holds(archive, "oci-layout") else "docker-archive"
        self._copy(f"{kind}:{archive}", parse(reference), [])

    def describe(self, id: str) -> Description:
        """Raises Error not_found for an image that is not in the storage."""
        path = self.root / "images" / f"{id.removeprefix('sha256:')}.json"
        with contextlib.suppress(FileNotFoundError, ValueError):
            return Description(**json.loads(path.read_text()))
        description = self._describe(id)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        temporary = path.with_suffix(f".{os.urandom(4).hex()}")
        temporary.write_text(json.dumps(asdict(description)))
        temporary.replace(path)
        return description

    def _find(self, wanted: Reference) -> str:
        """The id of the image of this name, "" for none."""
        return next((f"sha256:{i['id']}" for i in self._records("images") if wanted.name in (i.get("names") or ())), "")

    def _records(self, kind: str) -> list[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            records = json.loads((self.storage / f"overlay-{kind}" / f"{kind}.json").read_text())
            return records if isinstance(records, list) else []
        return []

    def _describe(self, id: str) -> Description:
        hexadecimal = id.removeprefix("sha256:")
        image = next((i for i in self._records("images") if i["id"] == hexadecimal), None)
        if not image:
            raise Error("not_found", f"the image {id} is not on this machine", "pull it again")
        # containers/storage names a file of an image after its key, in Base64 when that has other than letters.
        key = base64.b64encode(id.encode()).decode()
        config = json.loads((self.storage / "overlay-images" / hexadecimal / f"={key}").read_text())
        layers = {layer["id"]: layer for layer in self._records("layers")}
        chain, size, at = [], 0, image["layer"]
        while at:
            chain.append(str(self.storage / "overlay" / at / "diff"))
            size += layers[at].get("diff-size") or 0
            at = layers[at].get("parent")
        with self._mounted(chain) as root:
            passwd, group, shadow = (_text(root, f"/etc/{name}") for name in ACCOUNTS)
            shell = next((path for path in SHELLS if _exists(root, path)), "/bin/sh")
        env = (config.get("config") or {}).get("Env") or []
        return Description(id, chain, env, size, shell, passwd, group, shadow)

    @contextlib.contextmanager
    def _mounted(self, layers: list[str]) -> Iterator[int]:
        """A descriptor of the image's root directory."""
        with tempfile.TemporaryDirectory(dir=self.root, prefix="mount-") as name:
            base = Path(name)
            for part in ("upper", "work", "root"):
                (base / part).mkdir()
            mounts.overlay(base / "root", [Path(layer) for layer in layers], base)
            try:
                with mounts.opened(os.open(base / "root", os.O_PATH | os.O_CLOEXEC)) as root:
                    yield root
            finally:
                mounts.unmount(base / "root")

    def _fetch(self, wanted: Reference, pull: Pull, progress: Callable[[Progress], None]) -> str:
        raise Error("not_found", f"the image {wanted.name} is not on this machine")

    def _copy(self, source: str, wanted: Reference, options: list[str]) -> None:
        # skip_mount_home: otherwise a mount of the storage on itself stays behind.
        storage = f"overlay@{self.storage}+{self.root}/run:overlay.skip_mount_home=true"
        target = f"containers-storage:[{storage}]{wanted.name}"
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", *options, source, target]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode != 0:
            raise Error("internal", f"skopeo failed: {done.stderr.decode(errors='replace').strip()}")


def _holds(archive: Path, name: str) -> bool:
    with tarfile.open(archive) as tar:
        return name in tar.getnames()


def _text(root: int, path: str) -> str | None:
    """A file of an image, wherever its links lead inside it; None for what is no regular file."""
    try:
        fd = mounts.open_in(root, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        return file.read(LONGEST).decode("utf-8", "surrogateescape")


def _exists(root: int, path: str) -> bool:
    try:
        os.close(mounts.open_in(root, path, os.O_PATH))
    except OSError:
        return False
    return True
