"""The programs that the driver needs: which there are, and those that every sandbox sees.

Owns: where they are looked for. Nothing is run here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from ...errors import Error

BUSYBOX = "/bin/busybox"
INITS = ("/usr/bin/tini-static", "/usr/bin/docker-init", "/usr/bin/catatonit", "/usr/libexec/podman/catatonit")
RUNTIMES = ("runc", "crun")


def find(names: Iterable[str]) -> str:
    """The first of these programs that there is. Raises Error unavailable."""
    for name in names:
        if path := shutil.which(name):
            return path
    raise Error("unavailable", f"none of {', '.join(names)} is installed", "beaker executor doctor")


def install(directory: Path) -> None:
    """Put what every sandbox sees into a directory, where it is not there or another version."""
    init, busybox = find(INITS), find((BUSYBOX,))
    entry = (resources.files("beaker_sessions.sandbox") / "entry.sh").read_bytes()
    for name, data, mode in (
        ("init", Path(init).read_bytes(), 0o755),
        ("busybox", Path(busybox).read_bytes(), 0o755),
        ("entry.sh", entry, 0o644),
    ):
        path = directory / name
        if not path.exists() or path.read_bytes() != data:
            temporary = path.with_suffix(".new")
            temporary.write_bytes(data)
            temporary.chmod(mode)
            temporary.replace(path)
