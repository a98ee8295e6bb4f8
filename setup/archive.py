"""The default image for the driver that keeps its own images: two layers, written as an archive and loaded.

The first layer is the base of packages, kept as a tar, so that a change of the command line makes only the second anew:
what `images/install.sh` changes. The archive's format is `docker save`'s:
https://github.com/moby/docker-image-spec, "Combined Image JSON + Filesystem Changeset Format".
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
import tempfile
import time
from pathlib import Path

from . import daemon, host, recipe
from .sources import sources
from .steps import Failed, Report, command

_DIRECTORY = host.STATE / "image"
_STAMP = host.STATE / "setup/image"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
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
        key = recipe.key()
        base = _base(report)
        with tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="build-") as name:
            directory = Path(name)
            try:
                report("installing the command")
                top = _top(base, directory, report)
                report("writing the archive")
                write(directory / "image.tar", [base, top], key)
            except OSError as error:
                raise Failed(f"the image cannot be built in {_DIRECTORY}: {error.strerror}") from None
            report("loading")
            program = [str(host.VENV / "bin/beaker"), "executor", "images", "load", str(directory / "image.tar")]
            command([*program, recipe.NAME], report, env=daemon.environment())
        host.write(_STAMP, key)
        return f"{recipe.NAME}, {(base.stat().st_size) / 1e6:.0f} MB"


def _base(report: Report) -> Path:
    """The tar of the base, made unless it is there."""
    base = _DIRECTORY / f"base-{host.codename()}-{recipe.base_key()}.tar"
    if not base.exists():
        with tempfile.TemporaryDirectory(dir=_DIRECTORY, prefix="build-") as name:
            Path(name).chmod(0o755)  # for apt, which gives its rights up
            part = Path(name, "base.tar")
            command(recipe.bootstrap(str(part), sources()), report, env={**daemon.environment(), "TMPDIR": name})
            for former in _DIRECTORY.glob("base-*.tar"):
                former.unlink()
            part.replace(base)
    return base


def _top(base: Path, directory: Path, report: Report) -> Path:
    """The tar of what installing changes on the base: all that is newer than its unpacking."""
    root, top = directory / "root", directory / "top.tar"
    root.mkdir(mode=0o755)
    # By tar, which is faster and keeps all owners; the attributes are those of file capabilities.
    command(["tar", "--xattrs", "--xattrs-include=*", "-xpf", str(base), "-C", str(root)], report)
    (root / "tmp/image").mkdir()
    time.sleep(0.02)  # the clock of files ticks more slowly than that of programs
    began = time.time_ns()
    time.sleep(0.02)
    for name, content in recipe.files():
        path = root / "tmp/image" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755 if os.access(recipe.DIRECTORY / name, os.X_OK) or path.name == "launcher" else 0o644)
    command(
        ["unshare", "--mount", "--net", "chroot", str(root), "sh", "/tmp/image/install.sh"], report,
        env={"PATH": _PATH, "LANG": "C.UTF-8", "HOME": "/root"},
    )  # fmt: skip
    shutil.rmtree(root / "tmp/image")
    with tarfile.open(top, "w") as layer:
        for path in sorted(root.rglob("*")):
            if path.lstat().st_ctime_ns >= began and path.relative_to(root).parts[0] != "tmp":
                layer.add(path, str(path.relative_to(root)), recursive=False)
    shutil.rmtree(root)
    return top


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
