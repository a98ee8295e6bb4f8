"""Images in containers-storage: found, fetched, and described once each.

Owns: one storage of the executor's own, which image is in it under which name, and a small description of each, so that
nothing but the description is read when a session starts. The work of fetching is skopeo's, under the limits of `room`.
Must not choose an image. Which are needed is the executor's to say; without its word none is removed to make room.

More than 400 lines, because what is handed out, fetched, described and removed at the same moment is decided together.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import Error
from ...model import Pull
from .. import Image, Limits, Login, Progress
from ..commands import tied
from ..docker.engine import Engine
from . import archive, documents, fetching, mounts
from .documents import Wrong
from .reference import HUB, Reference, parse
from .registry import Registry
from .room import Failed, Full, Room
from .storage import Storage, size

SHELLS = ("/bin/bash", "/usr/bin/bash", "/usr/local/bin/bash", "/bin/sh")
LONGEST = 4 << 20  # bytes of an account file
FULL = 256 << 20  # bytes of free space below which a failure is one of space
STEP = 16 << 20  # bytes of an archive between two looks at the disk
LEASE = 600.0  # seconds in which whoever was given an image makes a sandbox of it, so that it is needed
PRUNE = "beaker executor images prune, or ask the administrator"
ACCOUNTS = ("passwd", "group", "shadow")
ARCHIVE = "invalid", "the archive holds what cannot be unpacked"
ASK = 5.0  # seconds for Docker Engine to say whether it has an image

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
    """root: a directory of the executor's own, on a file system that overlays can be on. docker: the socket of the
    local Docker Engine, "" for none. realms: as of `Registry`. needed: the ids of images that must stay; None: nobody
    has said it yet.
    """

    def __init__(
        self, root: Path, docker: str = "", limits: Limits | None = None, realms: Mapping[str, str] | None = None
    ) -> None:
        self.root, self.docker, self.realms = root, docker, realms or {}
        self._engine = Engine(docker)  # one, so that its version is asked for once and not by each create
        self.needed: Callable[[], set[str]] | None = None
        with contextlib.suppress(FileExistsError):
            root.mkdir(mode=0o700, parents=True)
        now = root.lstat()
        if not stat.S_ISDIR(now.st_mode) or now.st_uid != os.geteuid():  # somebody made it before us
            raise Error("unavailable", f"{root} is no directory of root's, so it holds no images", f"remove {root}")
        root.chmod(0o700)  # earlier versions let everybody pass
        (root / "images").mkdir(mode=0o700, exist_ok=True)
        self.storage = Storage(root / "storage")
        self.room = Room(root, limits or Limits(), self.storage.stored)
        self._turns = fetching.Turns(root)
        self._choosing = threading.Lock()
        self._leases: dict[str, float] = {}  # by id, until when
        self._leaving: set[str] = set()  # being removed
        for pattern in ("pull-*", "mount-*"):  # of an executor that was killed
            for path in root.glob(pattern):
                mounts.remove_tree(path)
        for path in (root / "images").glob("*.????????"):  # files that were not renamed
            path.unlink()
        try:
            self._tidy()
        except (OSError, ValueError, Error) as error:  # live sessions go on; what needs the storage says more
            log.warning("the images cannot be tidied: %s", error)

    def get(
        self, reference: str, pull: Pull, progress: Callable[[Progress], None], login: Login = lambda _: None,
        going: Callable[[], None] = lambda: None,
    ) -> Image:  # fmt: skip
        """As `Sandboxes.image`. The image stays for LEASE at least, in which a sandbox can be made of it."""
        with _told(reference):
            return self._get(reference, pull, progress, login, going)

    def _get(
        self, reference: str, pull: Pull, progress: Callable[[Progress], None], login: Login, going: Callable[[], None]
    ) -> Image:
        wanted = parse(reference)
        id = self._take(wanted) if pull is not Pull.ALWAYS else ""
        while not id:
            with self._turns.of(wanted.name, going) as turn:
                # Who waited for another's fetch has what that fetched.
                id = self._take(wanted) if pull is not Pull.ALWAYS else ""
                if not id:
                    self._fetch(wanted, pull, progress, login, going, turn)
                    id = self._lease(self._find(wanted))
        description = self.describe(id)
        os.utime(self._description(id))  # when it was last used
        return Image(description.id, reference, tuple(description.env), description.size)

    def load(self, file: Path, reference: str) -> None:
        """Take an image from an OCI or Docker archive file, under a name. Raises Error invalid for other files."""
        with _told(reference):
            self._load(file, parse(reference))

    def _load(self, file: Path, wanted: Reference) -> None:
        if archive.kind(file) == "docker":
            # Decompressed into a temporary file, of a size that nobody knows, when it is compressed.
            self._copy(f"docker-archive:{file}", wanted, [], ARCHIVE, packed=self.room.limits.image)
            return
        with tempfile.TemporaryDirectory(dir=self.root, prefix="pull-") as name:
            total = seen = 0

            def look(more: int) -> None:
                nonlocal total, seen
                total += more
                if total - seen > STEP:
                    seen = total
                    if why := self.room.too_large(total) or self.room.lacks(STEP):
                        raise Error("storage_full", f"the archive was not taken: {why}", PRUNE)

            archive.unpack(file, Path(name), look)
            self._copy(f"oci:{name}", wanted, [], ARCHIVE, packed=total)

    def stored(self) -> list[Stored]:
        """All images, the one that was used last first."""
        found = []
        for record in self.storage.images():
            id = f"sha256:{record['id']}"
            used = datetime.fromtimestamp(0, UTC)
            with contextlib.suppress(FileNotFoundError):
                used = datetime.fromtimestamp(self._description(id).stat().st_mtime, UTC)
            total = sum(map(size, self.storage.chain(record)))
            found.append(Stored(id, tuple(record.get("names") or ()), total, used))
        return sorted(found, key=lambda image: image.used, reverse=True)

    def id(self, reference: str) -> str:
        """The id of the image that a reference means here, "" for none."""
        return self._find(parse(reference))

    def remove(self, id: str) -> bool:
        """Delete an image, and those of its layers that no other has. False, and it stays, when it is needed now."""
        with self.room.clearing():
            return self._remove(id, self.needed() if self.needed else set())

    def _remove(self, id: str, needed: set[str]) -> bool:
        """Nobody may add to the storage meanwhile."""
        with self._choosing:
            if id in needed or self._leases.get(id, 0) > time.monotonic():
                return False
            self._leaving.add(id)
        try:
            target = f"containers-storage:[{self._store}]@{id.removeprefix('sha256:')}"
            command = tied(["skopeo", "--insecure-policy", "delete", target])  # the next executor may hand it out
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode:
                log.warning("skopeo: %s", " ".join(done.stderr.decode(errors="replace").split()))
                raise Error("internal", f"the image {id} could not be removed; the executor's log says more")
            self._description(id).unlink(missing_ok=True)
        finally:
            self._leaving.discard(id)
        return True

    def _take(self, wanted: Reference) -> str:
        """The id of the image of this name, which then stays; "" for none."""
        return self._lease(self._current(wanted))

    def _lease(self, id: str) -> str:
        with self._choosing:
            now = time.monotonic()
            self._leases = {other: until for other, until in self._leases.items() if until > now}
            known = {image["id"] for image in self.storage.images()}
            if id in self._leaving or id.removeprefix("sha256:") not in known:
                return ""
            self._leases[id] = now + LEASE
        return id

    def describe(self, id: str) -> Description:
        """Raises Error not_found for an image that is not in the storage."""
        path = self._description(id)
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Description(**json.loads(path.read_text()))
        try:
            description = self._describe(id)
        except (OSError, Error):
            self._record(id)  # that it was removed meanwhile says more
            raise
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
        images, name = self.storage.images(), self._name(wanted)
        return next((f"sha256:{i['id']}" for i in images if name in (i.get("names") or ())), "")

    def _name(self, wanted: Reference) -> str:
        """The name in the storage, where a digest is always that of a manifest, and not of an index."""
        if wanted.digest:
            with contextlib.suppress(FileNotFoundError):
                return f"{wanted.host}/{wanted.path}@{self._chosen(wanted).read_text()}"
        return wanted.name

    def _chosen(self, wanted: Reference) -> Path:
        """A file with the digest of the manifest that was for this machine in the index of this digest."""
        return self.root / "images" / f"{wanted.digest.removeprefix('sha256:')}.index"

    def _record(self, id: str) -> dict[str, Any]:
        image = next((i for i in self.storage.images() if i["id"] == id.removeprefix("sha256:")), None)
        if not image:
            raise Error("not_found", f"the image {id} is not on this machine", "pull it again")
        return image

    def _describe(self, id: str) -> Description:
        image = self._record(id)
        layers = self.storage.chain(image)
        try:
            env = self.storage.env(image)
            if len(layers) > documents.LAYERS:
                raise Wrong(f"more than {documents.LAYERS} layers")
        except Wrong as error:
            name = next(iter(image.get("names") or ()), id)
            raise Error("invalid", f"the image {name} cannot be used: it has {error}", "build it anew") from None
        chain = [self.storage.path(layer) for layer in layers]
        passwd, group, shadow, shell = self._look(chain)
        return Description(id, chain, env, sum(map(size, layers)), shell, passwd, group, shadow)

    def _look(self, layers: list[str]) -> tuple[str | None, str | None, str | None, str]:
        """An image's account files, None for each that it has not, and its best shell."""
        with tempfile.TemporaryDirectory(dir=self.root, prefix="mount-") as name:
            base = Path(name)
            for part in ("upper", "work", "root"):
                (base / part).mkdir()

            def look() -> tuple[str | None, str | None, str | None, str]:
                mounts.overlay(base / "root", [Path(layer) for layer in layers], base)
                with mounts.opened(os.open(base / "root", os.O_PATH | os.O_CLOEXEC)) as root:
                    shell = next((path for path in SHELLS if _exists(root, path)), "/bin/sh")
                    passwd, group, shadow = (_text(root, f"/etc/{name}") for name in ACCOUNTS)
                    return passwd, group, shadow, shell

            return mounts.private(look)

    def _fetch(
        self, wanted: Reference, pull: Pull, progress: Callable[[Progress], None], login: Login,
        going: Callable[[], None], turn: fetching.Turn,
    ) -> None:  # fmt: skip
        if pull is not Pull.ALWAYS and (docker := self._in_docker(wanted)):
            total = int(docker["Size"])
            if why := self.room.too_large(total):
                raise self._full(wanted, why)
            progress(Progress(0, total, (0, 1)))
            options = ["--src-daemon-host", f"unix://{self.docker}"]
            look = lambda: progress(Progress(0, total, (0, 1)))  # noqa: E731 - it may end it
            refused = "unavailable", "Docker Engine did not hand it over"
            self._copy(f"docker-daemon:{_familiar(wanted)}", wanted, options, refused, total, look)
            progress(Progress(total, total, (1, 1)))
            self._origin(wanted).touch()
        elif pull is Pull.NEVER:
            what = f"the image {wanted.name} is not on this machine, and --pull is never"
            raise Error("not_found", what, "--pull missing")
        else:
            self._pull(wanted, progress, login, going, turn)
            self._origin(wanted).unlink(missing_ok=True)

    def _in_docker(self, wanted: Reference) -> dict[str, Any]:
        """What the local Docker Engine says about the image of this name, empty for none."""
        if not self.docker or not os.path.exists(self.docker):
            return {}
        try:
            return dict(self._engine.call("GET", f"/images/{_familiar(wanted)}/json", timeout=ASK))
        except Error:  # also when the engine is away: then its images are not on this machine
            return {}

    def _pull(
        self, wanted: Reference, progress: Callable[[Progress], None], login: Login, going: Callable[[], None],
        turn: fetching.Turn,
    ) -> None:  # fmt: skip
        """Fetch from the registry into a directory, as skopeo's `dir:` has it, and from there into the storage."""
        source = Registry(wanted, login(f"{wanted.host}/{wanted.path}"), self.realms)
        manifest = fetching.manifest(source, going)
        blobs = list(dict.fromkeys(manifest.blobs))  # each once
        total = sum(blob.size for blob in blobs)
        if why := self.room.too_large(total):
            raise self._full(wanted, why)
        progress(Progress(0, total, (0, len(manifest.blobs) - 1)))  # who may not fetch it is told before it begins
        directory = turn.directory
        (directory / "version").write_text("Directory Transport Version: 1.1\n")
        (directory / "manifest.json").write_bytes(manifest.raw)

        def look() -> None:
            progress(fetching.progress(manifest, directory))

        def fill() -> None:
            fetching.fetch(source, blobs, directory, self.room, look)

        self._with_room(wanted, fill, look)
        look()
        with source.told():
            config = documents.json_object((directory / manifest.blobs[0].file).read_bytes())
            if len(documents.layers(config)) != len(manifest.blobs) - 1:
                raise Wrong("a configuration of other layers")
            documents.env(config)
        digest = f"sha256:{hashlib.sha256(manifest.raw).hexdigest()}"
        if wanted.digest and digest != wanted.digest:
            temporary = self._chosen(wanted).with_suffix(f".{os.urandom(4).hex()}")
            temporary.write_text(digest)
            temporary.replace(self._chosen(wanted))
        refused = "invalid", f"{wanted.host} sends what cannot be unpacked"
        self._copy(f"dir:{directory}", wanted, [], refused, total, look)
        turn.clear()

    def _copy(
        self, source: str, wanted: Reference, options: list[str], refused: tuple[str, str], packed: int,
        look: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Bring an image into the storage, under a name, and describe it. Of what cannot be taken nothing stays.

        refused: code and text of the error when skopeo does not take it. packed: its bytes as they come, which are on
        the disk beside the unpacked ones for a while. look: called meanwhile; may raise to end it.
        """
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", *options, source]
        command.append(f"containers-storage:[{self._store}]{self._name(wanted)}")
        before = {f"sha256:{image['id']}" for image in self.storage.images()}

        def copy() -> None:
            with self.room.filling(look):
                self.room.run(command, look, packed=packed)

        try:
            self._with_room(wanted, copy, look)
        except BaseException as error:
            if self.room.quiet():
                with self.room.clearing():
                    self._tidy()
            if isinstance(error, Failed):
                raise self._failure(wanted, error, refused) from None
            raise
        id = self._find(wanted)
        try:
            found = self.describe(id)
            if why := self.room.too_large(found.size):
                raise self._full(wanted, why)
        except Error:
            if id not in before:
                with self.room.clearing(look):
                    self._remove(id, set())
            raise

    def _with_room(self, wanted: Reference, fill: Callable[[], None], look: Callable[[], None]) -> None:
        """Fill the disk; when room is short, remove what is not needed, the longest unused first, and try again."""
        need = 0
        while True:
            try:
                return fill()
            except Full as full:
                need = max(2 * need, 2 * full.written)
                if full.single or not self._make_room(need, look):
                    raise self._full(wanted, full.why) from None

    def _make_room(self, need: int, look: Callable[[], None]) -> int:
        """Remove images until so many bytes more have room. How many were removed."""
        removed = 0
        with self.room.clearing(look):
            self._tidy()
            for image in reversed(self.stored()) if self.needed else ():
                if not self.room.lacks(need):
                    break
                if self._remove(image.id, self.needed() if self.needed else set()):
                    log.info("removed the image %s to make room: %s", image.id, ", ".join(image.names))
                    removed += 1
        return removed

    def _tidy(self) -> None:
        """Remove what programs left that were stopped. Nobody may add to the storage meanwhile."""
        # Descriptions without any image: its list was lost, and the layers may be those of live sessions.
        if self.storage.images() or not any((self.root / "images").glob("*.json")):
            self.storage.sweep()
        self.room.cleared()

    def _full(self, wanted: Reference, why: str) -> Error:
        log.warning("the image %s was not taken: %s", wanted.name, why)
        return Error("storage_full", f"the image {wanted.name} was not taken: {why}", PRUNE)

    @property
    def _store(self) -> str:
        """The storage, as skopeo takes it."""
        # skip_mount_home: otherwise a mount of the storage on itself stays behind.
        return f"overlay@{self.storage.root}+{self.root}/run:overlay.skip_mount_home=true"

    def _failure(self, wanted: Reference, failed: Failed, refused: tuple[str, str]) -> Error:
        """A full disk, if that is what it is; what the tool said goes to the log."""
        log.warning("skopeo: %s", " ".join(failed.complaint.decode(errors="replace").split()))
        disk = os.statvfs(self.root)
        if disk.f_bavail * disk.f_frsize < FULL:
            return Error("storage_full", f"no space for the image in {self.root}", PRUNE)
        code, why = refused if failed.status == 1 else ("unavailable", "skopeo was ended, or cannot be started")
        return Error(code, f"the image {wanted.name} was not taken: {why}", "the executor's log says more")


@contextlib.contextmanager
def _told(reference: str) -> Iterator[None]:
    """What the file system refuses, as people should see it."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Error("storage_full", f"the image {reference} was not taken: {error.strerror}", PRUNE) from error
        raise Error("internal", f"the image {reference} cannot be had: {error}") from error


def _familiar(wanted: Reference) -> str:
    """The name as Docker Engine has it."""
    return wanted.name.removeprefix(f"{HUB}/").removeprefix("library/")


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
