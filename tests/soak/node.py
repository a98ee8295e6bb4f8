"""The stack of the campaign with the driver `oci`: no Docker Engine, a small image, and what its sessions leave."""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from beaker_sessions.client import Client
from beaker_sessions.sandbox.oci import cgroups
from beaker_sessions.sandbox.oci.driver import RUN
from tests import images
from tests.stack import Stack, load_image, wait_for

IMAGE = "alpine"


class Node(Stack):
    """A server and an executor. Its users may pass through root."""

    def start(self) -> None:
        tokens = ["--token-file", self.admin_file, "--executor-token-file", self.token_file]
        init = [self.programs / "beaker-server", "--config", self.config, "init", "--account", "root", *tokens]
        subprocess.run(init, check=True, capture_output=True)
        self.server.start()
        self.admin = Client(self.endpoint, self.admin_file.read_text().strip())
        wait_for("the server", lambda: self.admin.whoami())
        self.start_executor()
        archive = self.root / "image.tar"
        images.oci_archive(images.alpine(), archive)
        load_image(self.socket, archive, IMAGE)

    def containers(self) -> list[str]:
        return []

    def ledger(self, query: str) -> list[tuple]:
        with contextlib.closing(sqlite3.connect(f"file:{self.state}/executor/ledger.db?mode=ro", uri=True)) as ledger:
            return ledger.execute(query).fetchall()

    def left(self) -> dict[str, list[str]]:
        """What there is of sessions that are not live, by kind; nothing when all is well."""
        state, run = self.state / "executor/oci", RUN / self.bridge
        live = set(self.live())
        mounted = Path("/proc/self/mountinfo").read_text().splitlines()
        groups = cgroups.detect()
        parent = "/beaker-" + re.sub(r"[^a-z0-9]+", "-", str(self.state).lower()).strip("-")
        used = {Path(line).name for line in _networks(state)}
        ready = {path.stem for path in (run / "networks").glob("*.ready")}
        found = {
            "directories": [path.name for path in (state / "sessions").iterdir() if path.name not in live],
            "runtime": [path.name for path in (state / "runtime").iterdir() if path.name not in live],
            "trash": [path.name for path in (state / "trash").iterdir()],
            "roots": [path.name for path in (run / "roots").iterdir() if path.name not in live],
            "mounts": [line for line in mounted if f" {state}/" in line and not _of(line, live)],
            "cgroups": sorted(groups.children(parent) - live),
            "networks": [
                path.name
                for path in (run / "networks").iterdir()
                if path.suffix != ".ready" and path.name not in used | ready
            ],
            "run directories": [path.name for path in (self.root / "sessions").iterdir() if path.stem not in live],
            "pulls": [path.name for path in (state / "images").glob("pull-*")],
            "claims": [id for (id,) in self.ledger("SELECT session FROM claims") if id not in live],
            "sandboxes": [id for id in self.sandboxes() if id not in live],
        }
        return {what: names for what, names in found.items() if names}


def _networks(state: Path) -> Iterator[str]:
    for path in (state / "sessions").glob("*/sandbox.json"):
        with contextlib.suppress(OSError, ValueError):
            yield json.loads(path.read_text())["network"]


def _of(line: str, live: set[str]) -> bool:
    return any(id in line for id in live)


@contextlib.contextmanager
def node(settings: Mapping[str, object] | None = None, gpus: int = 2) -> Iterator[Node]:
    root = Path(tempfile.mkdtemp(prefix="bs-"))
    root.chmod(0o755)
    made = Node(root, gpus=gpus, driver="oci", settings={"defaultImage": IMAGE, "mountPaths": [], **(settings or {})})
    try:
        made.start()
        yield made
    finally:
        if hasattr(made, "admin"):
            made.close()
