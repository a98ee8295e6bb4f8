"""What sessions are compared with: `docker`, `podman` and bare `runc`, on the same image. Each has its own state.

A peer is commands to run; what it cannot do is None.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.stack import Stack, User

from .measure import Command

# Ours are started as an ordinary user, which makes Python fork instead of vfork; peers pay for the same.
ROOT = {"user": 0, "group": 0, "extra_groups": [0]}


@dataclass(frozen=True)
class Subject:
    """run: a whole container for one command, in a terminal with `interactive`. exec: in one that runs already."""

    name: str
    run: Command
    interactive: Command | None
    exec: Command | None
    process: dict


def session(stack: Stack, user: User, beaker: str, id: str) -> Subject:
    """Our own, with the stack's driver. id: of a session that runs."""
    create = [beaker, "session", "create", "--gpus", "0", "--"]
    return Subject(stack.driver, create, create, [beaker, "session", "exec", id, "--"], user.process())


def docker(stack: Stack, container: str) -> Subject:
    command = ["docker", "-H", f"unix://{stack.docker_socket}"]
    run = [*command, "run", "--rm", "--network", "bridge"]
    return Subject("docker run", [*run, "debian"], [*run, "-it", "debian"], [*command, "exec", container], ROOT)


@contextmanager
def podman(root: Path, image: Path) -> Iterator[Subject]:
    """As Debian ships it, with `runc`, and no limits raised above what this machine allows."""
    root.mkdir()
    (root / "containers.conf").write_text("[containers]\ndefault_ulimits = []\n")
    command = [
        "env", f"CONTAINERS_CONF={root}/containers.conf", "podman", f"--root={root}/storage", f"--runroot={root}/run",
        "--cgroup-manager=cgroupfs", "--runtime=runc", "--events-backend=none",
    ]  # fmt: skip
    subprocess.run([*command, "import", str(image), "debian"], check=True, capture_output=True)
    done = subprocess.run(
        [*command, "run", "-d", "debian", "sleep", "1000000"], check=True, capture_output=True, text=True
    )
    run = [*command, "run", "--rm"]
    try:
        yield Subject(
            "podman run", [*run, "debian"], [*run, "-it", "debian"], [*command, "exec", done.stdout.strip()], ROOT
        )
    finally:
        subprocess.run([*command, "rm", "--force", "--all", "--time", "0"], check=True, capture_output=True)
        subprocess.run([*command, "system", "reset", "--force"], capture_output=True)


@contextmanager
def runc(root: Path, image: Path) -> Iterator[Subject]:
    """One bundle with `runc`'s own defaults: no network, no image handling, no terminal holder, root on the machine."""
    bundle = root / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    subprocess.run(["tar", "-xf", image, "-C", bundle / "rootfs"], check=True)
    subprocess.run(["runc", "spec"], cwd=bundle, check=True)
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(terminal=False, args=["true"])
    config["process"].pop("rlimits")
    config["root"]["readonly"] = False
    (bundle / "config.json").write_text(json.dumps(config))
    long = root / "long"
    long.mkdir()
    config["process"]["args"] = ["sleep", "1000000"]
    config["root"]["path"] = str(bundle / "rootfs")
    (long / "config.json").write_text(json.dumps(config))
    command = ["runc", f"--root={root}/state"]
    detached = [*command, "run", "--detach", "--bundle", str(long), "bench-long"]
    subprocess.run(detached, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # which it keeps
    try:
        run = [*command, "run", "--bundle", str(bundle), "bench"]
        yield Subject("runc run", run, None, [*command, "exec", "bench-long"], ROOT)
    finally:
        subprocess.run([*command, "delete", "--force", "bench-long"], check=True, capture_output=True)
