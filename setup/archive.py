"""The default image for the driver that keeps its own images: three layers, written as an archive and loaded.

The first two, of packages and of tools, are kept as tars, so that a change of the command line makes only the third
anew. Each is what its `install.sh` changes on those below it. The archive's format is `docker save`'s:
https://github.com/moby/docker-image-spec, "Combined Image JSON + Filesystem Changeset Format".
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import platform
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from . import daemon, host, installed, recipe
from .sources import sources
from .steps import Failed, Report, command

_DIRECTORY = host.STATE / "image"
_STAMP = host.STATE / "setup/image"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_PASSING = ("dev", "proc", "sys", "tmp")
# Run in a mount namespace of its own, with the root's path as $0; a base has the files that are mounted over.
_INSTALL = """
for file in /etc/resolv.conf /etc/hosts; do [ ! -e "$0$file" ] || mount --bind "$(realpath $file)" "$0$file"; done
mount -t proc proc "$0/proc"
exec chroot "$0" sh /tmp/image/install.sh
"""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def current() -> bool:
    """Whether it is loaded. What the executor prunes, it is not."""
    return _STAMP.exists() and _STAMP.read_text() == recipe.key()


def make(report: Report) -> str:
    """Build what is missing and load it. Interrupted at any point, it begins again with what was whole."""
    _DIRECTORY.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(_DIRECTORY / "lock", "w") as lock:
        report("waiting for another build")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if current():
            return "made meanwhile"
        for left in _DIRECTORY.glob("build-*"):  # of one that was killed
            shutil.rmtree(left)
        key, listener = recipe.key(), recipe.Listener(report)
        with building(_DIRECTORY) as directory:
            layers = build(_DIRECTORY, directory, listener)
            report("writing the archive")
            write(directory / "image.tar", layers, key)
            report("loading")
            program = [str(installed.CURRENT / "bin/beaker"), "executor", "images", "load"]
            command([*program, str(directory / "image.tar"), recipe.NAME], report, env=daemon.environment())
            size = sum(one.stat().st_size for one in layers) / 1e6
        host.write(_STAMP, key)
        return f"{recipe.NAME}, {size:.0f} MB{listener.left_out()}"


@contextmanager
def building(place: Path) -> Iterator[Path]:
    """A directory that is gone afterwards. Raises Failed for what the disk refuses."""
    with tempfile.TemporaryDirectory(dir=place, prefix="build-") as name:
        Path(name).chmod(0o755)  # for apt, which gives its rights up
        try:
            yield Path(name)
        except OSError as error:
            raise Failed(f"the image cannot be built in {place}: {error}") from None


def build(place: Path, directory: Path, report: Report, python: Path = installed.PYTHON) -> list[Path]:
    """The tars of the layers; those of packages and tools are kept in a place, and made unless they are there.

    directory: for what is being made. python: one with pip.
    """
    base = place / f"base-{host.codename()}-{recipe.base_key()}.tar"
    if not base.exists():
        bootstrap(directory / "base.tar", report)
        _keep(directory / "base.tar", base, "base-*.tar")
    tools = place / f"tools-{host.codename()}-{recipe.tools_key()}.tar"
    if not tools.exists():
        _keep(layer("tools", [base], directory, recipe.programs(report, python), report), tools, "tools-*.tar")
    return [base, tools, layer("command", [base, tools], directory, {}, report)]


def _keep(made: Path, target: Path, former: str) -> None:
    for path in target.parent.glob(former):
        path.unlink()
    made.replace(target)


def bootstrap(target: Path, report: Report) -> None:
    """Write the base as a tar."""
    recipe.lacking(report)
    environment = {**daemon.environment(), "TMPDIR": str(target.parent)}
    command(recipe.bootstrap(str(target), sources()), report, env=environment)


def layer(name: str, below: list[Path], directory: Path, programs: Mapping[str, bytes], report: Report) -> Path:
    """The tar of what a layer's `install.sh` changes on those below it: all that is newer than their unpacking."""
    root, result = directory / "root", directory / f"{name}.tar"
    root.mkdir(mode=0o755)
    report("unpacking")
    for one in below:  # by tar, which is faster and keeps all owners; the attributes are those of file capabilities
        command(["tar", "--xattrs", "--xattrs-include=*", "-xpf", str(one), "-C", str(root)], report)
    (root / "tmp/image").mkdir()
    time.sleep(0.02)  # the clock of files ticks more slowly than that of programs
    began = time.time_ns()
    time.sleep(0.02)
    for path, content in recipe.files(name):
        _put(root / "tmp/image" / path, content, 0o644)
    for program, content in programs.items():
        _put(root / "usr/local/bin" / program, content, 0o755)
    # Only tools come from the network.
    network = [] if name == "tools" else ["--net"]
    command(
        ["unshare", "--mount", *network, "sh", "-c", _INSTALL, str(root)], report,
        env={**daemon.environment(), "PATH": _PATH},
    )  # fmt: skip
    shutil.rmtree(root / "tmp/image")
    with tarfile.open(result, "w") as tar:
        for path in sorted(root.rglob("*")):
            if path.lstat().st_ctime_ns >= began and path.relative_to(root).parts[0] not in _PASSING:
                tar.add(path, str(path.relative_to(root)), recursive=False)
    shutil.rmtree(root)
    return result


def _put(path: Path, content: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)


def write(target: Path, layers: list[Path], key: str) -> None:
    """Write the image of these layers, the lowest first, as an archive."""
    digests = []
    for layer in layers:
        with layer.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Env": [f"PATH={_PATH}", "LANG=C.UTF-8"], "Cmd": ["bash"], "Labels": {recipe.LABEL: key}},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in digests]},
    }
    names = [f"{digest}.tar" for digest in digests]
    manifest = [{"Config": "config.json", "RepoTags": [f"{recipe.NAME}:latest"], "Layers": names}]
    with tarfile.open(target, "w") as archive:
        for layer, name in zip(layers, names, strict=True):
            archive.add(layer, name)
        for name, content in (("config.json", config), ("manifest.json", manifest)):
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
