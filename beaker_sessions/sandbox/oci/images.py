"""Images in containers-storage: found, fetched, and described once each.

Owns: one storage of the executor's own (its layers and their order, as containers/storage keeps them for the overlay
driver), and a small description of each image, so that nothing but the description is read when a session starts. The
work of fetching is skopeo's. Must not choose an image.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import logging
import os
import stat
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import Error
from ...model import Pull
from .. import Image, Login, Progress
from ..docker.engine import Engine
from . import mounts, registry
from .reference import HUB, Reference, parse

SHELLS = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh")
PAUSE = 0.1  # seconds between two reports of progress
LONGEST = 4 << 20  # bytes of an account file
FULL = 256 << 20  # bytes of free space below which a failure is one of space
ARCHIVES = {"oci-layout": "oci-archive", "manifest.json": "docker-archive"}  # by the file that only it has
ACCOUNTS = ("passwd", "group", "shadow")

log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Stored:
    """An image on this machine. names: in full, none for one whose name another has taken. size: bytes."""

    id: str
    names: tuple[str, ...]
    size: int
    used: datetime


class Images:
    """root: a directory of the executor's own. docker: the socket of the local Docker Engine, "" for none."""

    def __init__(self, root: Path, docker: str = "") -> None:
        self.root, self.docker = root, docker
        self.storage = root / "storage"
        (root / "images").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fetching: dict[str, threading.Lock] = {}
        for pattern in ("pull-*", "mount-*"):  # of an executor that was killed
            for path in root.glob(pattern):
                mounts.remove_tree(path)

    def get(
        self, reference: str, pull: Pull, progress: Callable[[Progress], None], login: Login = lambda _: None
    ) -> Image:
        """As `Sandboxes.image`."""
        wanted = parse(reference)
        id = self._current(wanted) if pull is not Pull.ALWAYS else ""
        if not id:
            with self._fetching.setdefault(wanted.name, threading.Lock()):
                # Who waited for another's fetch has what that fetched.
                id = self._current(wanted) if pull is not Pull.ALWAYS else ""
                id = id or self._fetch(wanted, pull, progress, login)
        description = self.describe(id)
        os.utime(self._description(id))  # when it was last used
        return Image(description.id, reference, tuple(description.env), description.size)

    def load(self, archive: Path, reference: str) -> None:
        """Take an image from an OCI or Docker archive file, under a name. Raises Error invalid for other files."""
        kind = next((kind for name, kind in ARCHIVES.items() if _holds(archive, name)), "")
        if not kind:
            raise Error("invalid", "the file is no archive of an image", "write one: docker save --output FILE IMAGE")
        self._copy(f"{kind}:{archive}", parse(reference), [])

    def stored(self) -> list[Stored]:
        """All images, the one that was used last first."""
        found = []
        for record in self._records("images"):
            id = f"sha256:{record['id']}"
            size = self.describe(id).size
            used = datetime.fromtimestamp(self._description(id).stat().st_mtime, UTC)
            found.append(Stored(id, tuple(record.get("names") or ()), size, used))
        return sorted(found, key=lambda image: image.used, reverse=True)

    def id(self, reference: str) -> str:
        """The id of the image that a reference means here, "" for none."""
        return self._find(parse(reference))

    def remove(self, id: str) -> None:
        """Delete an image, and those of its layers that no other has. No sandbox may be made of it."""
        self._skopeo(["delete", f"containers-storage:[{self._store}]@{id.removeprefix('sha256:')}"], id)
        self._description(id).unlink(missing_ok=True)

    def describe(self, id: str) -> Description:
        """Raises Error not_found for an image that is not in the storage."""
        path = self._description(id)
        with contextlib.suppress(FileNotFoundError, ValueError):
            return Description(**json.loads(path.read_text()))
        description = self._describe(id)
        temporary = path.with_suffix(f".{os.urandom(4).hex()}")
        temporary.write_text(json.dumps(asdict(description)))
        temporary.replace(path)
        return description

    def _description(self, id: str) -> Path:
        return self.root / "images" / f"{id.removeprefix('sha256:')}.json"

    def _current(self, wanted: Reference) -> str:
        """The id of the image of this name, "" for none and for one that Docker Engine has built anew since."""
        id = self._find(wanted)
        if id and self._origin(wanted).exists() and (docker := self._in_docker(wanted)) and docker["Id"] != id:
            return ""
        return id

    def _origin(self, wanted: Reference) -> Path:
        """A file that exists when the image of this name came from Docker Engine."""
        return self.root / "images" / f"{hashlib.sha256(wanted.name.encode()).hexdigest()}.docker"

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

    def _fetch(self, wanted: Reference, pull: Pull, progress: Callable[[Progress], None], login: Login) -> str:
        if pull is not Pull.ALWAYS and (docker := self._in_docker(wanted)):
            size = int(docker["Size"])
            progress(Progress(0, size, (0, 1)))
            self._copy(f"docker-daemon:{_familiar(wanted)}", wanted, ["--src-daemon-host", f"unix://{self.docker}"])
            progress(Progress(size, size, (1, 1)))
            self._origin(wanted).touch()
        elif pull is Pull.NEVER:
            what = f"the image {wanted.name} is not on this machine, and --pull is never"
            raise Error("not_found", what, "--pull missing")
        else:
            self._pull(wanted, progress, login)
            self._origin(wanted).unlink(missing_ok=True)
        return self._find(wanted)

    def _in_docker(self, wanted: Reference) -> dict[str, Any]:
        """What the local Docker Engine says about the image of this name, empty for none."""
        if not self.docker or not os.path.exists(self.docker):
            return {}
        try:
            return dict(Engine(self.docker).call("GET", f"/images/{_familiar(wanted)}/json"))
        except Error:  # also when the engine is away: then its images are not on this machine
            return {}

    def _pull(self, wanted: Reference, progress: Callable[[Progress], None], login: Login) -> None:
        """Fetch from the registry, by way of a directory in which one can see how far it is."""
        temporary = tempfile.TemporaryDirectory(dir=self.root, prefix="pull-")
        with temporary as name, registry.authorized(wanted, login, self.root) as authfile:
            exact, sizes = registry.manifest(wanted, authfile)
            command = ["skopeo", "--insecure-policy", "copy", "--quiet", f"--src-authfile={authfile}"]
            command += [f"--src{option[1:]}" for option in registry.options(wanted)]
            progress(Progress(0, sum(sizes), (0, len(sizes))))  # who may not fetch it is told before it begins
            with subprocess.Popen(
                [*command, f"docker://{exact.name}", f"dir:{name}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            ) as process:
                # Its complaint fits into the pipe, and it says nothing else.
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(PAUSE)
                        break
                    try:
                        progress(_progress(Path(name), sizes))
                    except BaseException:
                        process.kill()  # nobody waits for it any more
                        raise
                complaint = process.stderr.read() if process.stderr else b""
            if process.returncode != 0:
                raise self._failure(complaint) or registry.failure(wanted)
            progress(Progress(sum(sizes), sum(sizes), (len(sizes), len(sizes))))
            self._copy(f"dir:{name}", wanted, [])

    def _copy(self, source: str, wanted: Reference, options: list[str]) -> None:
        """Bring an image into the storage, under a name."""
        name = wanted.name if wanted.tag else f"{wanted.host}/{wanted.path}@{wanted.digest}"
        self._skopeo(["copy", "--quiet", *options, source, f"containers-storage:[{self._store}]{name}"], wanted.name)

    @property
    def _store(self) -> str:
        """The storage, as skopeo takes it."""
        # skip_mount_home: otherwise a mount of the storage on itself stays behind.
        return f"overlay@{self.storage}+{self.root}/run:overlay.skip_mount_home=true"

    def _skopeo(self, arguments: list[str], what: str) -> None:
        done = subprocess.run(["skopeo", "--insecure-policy", *arguments], capture_output=True, check=False)
        if done.returncode != 0:
            message = " ".join(done.stderr.decode(errors="replace").split())
            raise self._failure(done.stderr) or Error("internal", f"{what}: skopeo failed: {message}")

    def _failure(self, complaint: bytes) -> Error | None:
        """A full disk, if that is what it is; what the tool said goes to the log."""
        log.warning("skopeo: %s", " ".join(complaint.decode(errors="replace").split()))
        disk = os.statvfs(self.root)
        if disk.f_bavail * disk.f_frsize < FULL:
            return Error("storage_full", f"no space for the image in {self.root}", "beaker executor images prune")
        return None


def _familiar(wanted: Reference) -> str:
    """The name as Docker Engine has it."""
    return wanted.name.removeprefix(f"{HUB}/").removeprefix("library/")


def _progress(directory: Path, sizes: list[int]) -> Progress:
    """How much of the layers has come: skopeo gives a file its digest as name when it is whole."""
    done = finished = 0
    with contextlib.suppress(FileNotFoundError):  # renamed while we look
        for entry in os.scandir(directory):
            if size := entry.stat().st_size:
                whole = len(entry.name) == 64 and size in sizes
                done += size if whole or entry.name.startswith("dir-put-blob") else 0
                finished += whole
    return Progress(min(done, sum(sizes)), sum(sizes), (min(finished, len(sizes)), len(sizes)))


def _holds(archive: Path, name: str) -> bool:
    try:
        with tarfile.open(archive) as tar:
            return name in tar.getnames()
    except tarfile.TarError:
        return False


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
