"""Images that the tests make themselves, without a registry: root file systems as tars.

`scratch` holds one static busybox and nothing else; `alpine` is built like Alpine Linux (busybox for everything,
account files with other names for our ids); `debian` is a small Debian. The first two take milliseconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from beaker_sessions.sandbox import busybox
from setup import host
from setup.sources import sources
from setup.steps import Failed
from tests import network

BUSYBOX = Path(busybox.BUSYBOX)
BUILD = Path(__file__).resolve().parents[1] / "build/images"
PACKAGES = "bash,procps,python3,sudo"
APPLETS = "cat date echo env false grep head id ls printf pwd seq sh sleep stty test touch true usleep wc whoami yes"
ALPINE_PASSWD = "root:x:0:0:root:/root:/bin/ash\nguest:x:1500:1500:guest:/var/empty:/bin/ash\n"
ALPINE_GROUP = "root:x:0:root\nguest:x:1500:guest\nstaff:x:44:guest\nvideo:x:27:root\n"


def scratch() -> bytes:
    return tar({"busybox": BUSYBOX.read_bytes()})


def alpine(more: Mapping[str, bytes | str] = MappingProxyType({})) -> bytes:
    files: dict[str, bytes | str] = {f"bin/{name}": "busybox" for name in APPLETS.split()}
    files |= {"bin/busybox": BUSYBOX.read_bytes(), "etc/passwd": ALPINE_PASSWD.encode()}
    files |= {"etc/group": ALPINE_GROUP.encode(), "etc/not-a-program": b"text\n"}
    return tar({**files, **more})


def links() -> bytes:
    """A hostile image: links to where something will be mounted, out of the root, and to descriptors."""
    files: dict[str, bytes | str] = {f"bin/{name}": "busybox" for name in APPLETS.split()}
    files |= {"bin/busybox": BUSYBOX.read_bytes(), "etc/passwd": ALPINE_PASSWD.encode()}
    files |= {"to-net": "/net", "to-home": "/home/ada", "to-outside": "../../../../../.."}
    return tar(files | {f"fd{number}": f"/proc/self/fd/{number}" for number in range(3, 32)})


def debian(*more: str) -> Path:
    """A tar of this machine's Debian with PACKAGES and more, kept in `build`.

    Raises CalledProcessError without a mirror.
    """
    return _bootstrap(host.codename(), ",".join([PACKAGES, *more]), sources())


def git() -> Path:
    """As `debian`, with Git and SSH."""
    return debian("git", "openssh-client", "openssh-server")


def bullseye() -> Path:
    """A tar of Debian 11, which has Python 3.9, from this machine's mirror. Raises CalledProcessError without one."""
    own = [line.split() for line in sources() if f" {host.codename()} " in line]
    mirror = [" ".join(["deb", one[-3], "bullseye", "main"]) for one in own[:1]]
    return _bootstrap("bullseye", "bash,coreutils,python3", mirror, "extract")  # nothing needs to be configured


def _bootstrap(release: str, packages: str, sources: list[str], variant: str = "minbase") -> Path:
    path = BUILD / f"debian-{hashlib.sha256(f'{release} {packages}'.encode()).hexdigest()[:12]}.tar"
    if path.exists():  # the checkout may be read-only
        return path
    with _building(path.name):
        if path.exists():
            return path
        partial = path.with_name(f"{os.getpid()}-{path.name}")
        command = ["mmdebstrap", f"--variant={variant}", f"--include={packages}", release, str(partial), *sources]
        network.on_the_machine(lambda: subprocess.run(command, check=True, capture_output=True))
        partial.replace(path)
    return path


@contextlib.contextmanager
def _building(name: str) -> Iterator[None]:
    """One process at a time: the others find what the first has made."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def missing_for_debian() -> str:
    """What this machine lacks to build `debian`, "" for nothing."""
    if any(BUILD.glob("debian-*.tar")) or shutil.which("mmdebstrap"):
        return ""
    return "needs mmdebstrap to build a Debian image"


def oci_archive(
    root: bytes, path: Path, env: tuple[str, ...] = (), *, compress: bool = False, config: bytes = b""
) -> None:
    """Write an image with one layer, the tar of a root file system, as an archive of an OCI image layout. config: the
    text of its configuration, by default what fits.

    https://github.com/opencontainers/image-spec, `image-layout.md`.
    """
    blobs: dict[str, bytes] = {}

    def blob(kind: str, content: bytes) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    def encoded(data: dict[str, object]) -> bytes:
        return json.dumps(data).encode()

    layer = blob("layer.v1.tar+gzip", gzip.compress(root, 6)) if compress else blob("layer.v1.tar", root)
    config = config or encoded(
        {
            "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Env": list(env)},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(root).hexdigest()}"]},
        }
    )
    manifest = {"schemaVersion": 2, "config": blob("config.v1+json", config), "layers": [layer]}
    index = {"schemaVersion": 2, "manifests": [blob("manifest.v1+json", encoded(manifest))]}
    files = {"oci-layout": encoded({"imageLayoutVersion": "1.0.0"}), "index.json": encoded(index), **blobs}
    path.write_bytes(tar(dict(files)))


def tar(files: dict[str, bytes | str]) -> bytes:
    """A tar of programs (bytes) and symbolic links (the target as str)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, what in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(what, str):
                member.type, member.linkname = tarfile.SYMTYPE, what
                tar.addfile(member)
            else:
                member.size, member.mode = len(what), 0o644 if name.startswith("etc/") else 0o755
                tar.addfile(member, io.BytesIO(what))
    return content.getvalue()


def default(target: Path | None) -> None:
    """The default image as an archive; its layers of packages and tools are kept in `build`. None: these alone."""
    from setup import archive, recipe

    place = BUILD / "default"
    place.mkdir(parents=True, exist_ok=True)
    with _building("default"), archive.building(place) as directory:
        layers: list[Path] = []
        python = Path(sys.executable)
        network.on_the_machine(lambda: layers.extend(archive.build(place, directory, lambda _: None, python)))
        if target:
            archive.write(target, layers, recipe.key())


def main() -> None:
    """Build all that takes long: `make test` does it beside the first tests. Whoever needs one says what it lacks."""
    for build in (debian, git, lambda: default(None), bullseye):
        with contextlib.suppress(OSError, subprocess.CalledProcessError, Failed):
            build()


if __name__ == "__main__":
    main()
