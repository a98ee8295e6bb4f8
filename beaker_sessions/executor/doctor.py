"""What `beaker executor doctor` says: each thing that a node needs, whether it is there, and what mends it.

Reads only. The engine's own findings come from the driver.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from .. import trust
from ..client import Client
from ..errors import Error
from ..integrity import MEND, damage
from ..sandbox import LOW_DISK, Finding, Sandboxes, cdi, vulnerabilities
from ..settings import CONFIG, ExecutorSettings, ServerSettings, load
from . import inventory, ledgerfile, plan

CHECK = 20.0  # seconds for the database of a server on this machine
MOUNTS = ExecutorSettings().mount_paths  # which nobody asked for
NVIDIA = Path("/dev/nvidiactl")  # there when NVIDIA's driver is loaded


def findings(
    settings: ExecutorSettings,
    sandboxes: Sandboxes,
    why: str,
    offered: inventory.Inventory | None = None,
    database: Path | None = None,
) -> Iterator[Finding]:
    """Everything, in the order one would mend it. why: the driver is this one and not the other. offered: by the
    executor that runs, which took stock when it started. database: the server's, if that is on this machine.
    """
    yield Finding("ok", f"sessions are run by the {sandboxes.name} driver" + (f", because {why}" if why else ""))
    yield from _files()
    yield from _ledger(settings)
    yield from _engine(sandboxes)
    if sandboxes.name != "docker":
        there = os.path.exists(settings.docker_socket)
        images = "its images can be used" if there else "images come from registries and archives"
        yield Finding("ok", f"Docker Engine is {'' if there else 'not '}at {settings.docker_socket}: {images}")
    yield from _server(settings)
    yield from _database(database)
    yield from _machine(settings, offered)


def _files() -> Iterable[Finding]:
    found = list(trust.problems()) or list(trust.of([], [CONFIG]))
    for what in found[:5]:
        yield Finding("error", f"others can change what root runs here: {what}", "chown root, chmod go-w; make session")
    if not found:
        yield Finding("ok", "nobody but root can change what root runs here, and its settings")


def _ledger(settings: ExecutorSettings) -> Iterable[Finding]:
    """Nothing where it was never damaged."""
    if aside := ledgerfile.put_aside(Path(settings.storage_path, "executor", "ledger.db")):
        when = datetime.fromtimestamp(aside[-1].stat().st_mtime, UTC)
        what = (
            f"the ledger was damaged (last written {when:%Y-%m-%d %H:%M} UTC), and was made anew of what could be read"
        )
        hint = (
            f"look after the disk; what was put aside is of no more use: rm {aside[-1].parent}/*.{ledgerfile.ASIDE}-*"
        )
        yield Finding("warning", f"{what}; the old one is {aside[-1]}", hint)


def _engine(sandboxes: Sandboxes) -> Iterable[Finding]:
    try:
        yield from sandboxes.check()
    except Error as error:
        yield Finding("error", error.message, error.hint)


def _server(settings: ExecutorSettings) -> Iterable[Finding]:
    try:
        token = Path(settings.token_path).read_text().strip()
    except OSError as error:
        yield Finding("error", f"the executor's token {settings.token_path}: {error.strerror}", "beaker-server init")
        return
    if Path(settings.token_path).stat().st_mode & 0o077:
        yield Finding(
            "error", f"others can read the executor's token {settings.token_path}", f"chmod 600 {settings.token_path}"
        )
    try:
        with closing(Client(settings.endpoint, token, 5)) as client:
            client.whoami()
        yield Finding("ok", f"the server at {settings.address} answers and knows this executor")
        if uid := settings.endpoint.taken_by():
            what = (
                f"the server's TCP port is held by a program of uid {uid}: browsers and other machines do not reach it"
            )
            yield Finding(
                "warning", what, "end that program (see `ss -ltnp`): the server takes the port within seconds"
            )
    except Error as error:
        yield Finding("error", error.message, error.hint)


def database(config: str | None) -> Path | None:
    """Where a server on this machine keeps its database, if the settings can be read."""
    try:
        return load(ServerSettings, config).file
    except Error:
        return None  # the server's matter


def _database(file: Path | None) -> Iterable[Finding]:
    """Whether the server's SQLite database is whole. Of a large one it looks at as much as it gets done in CHECK."""
    if file is None or not file.exists():
        return
    until = time.monotonic() + CHECK
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as opened:
            opened.set_progress_handler(lambda: time.monotonic() > until, 10_000)
            found = damage(opened)
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_INTERRUPT:
            yield Finding("warning", f"the database {file} could not be checked: {error}", "run it again")
        return
    if found:
        yield Finding("error", f"the database {file} is damaged: {found}", MEND)
    else:
        yield Finding("ok", f"the database {file} is whole")


def _machine(settings: ExecutorSettings, offered: inventory.Inventory | None) -> Iterable[Finding]:
    registry = cdi.load(settings.cdi_paths, settings.cdi_hooks)
    yield from registry.findings
    has = None
    try:
        has = inventory.read(settings)
        listed = ", ".join(f"{gpu.id} ({gpu.type})" for gpu in has.gpus)
        yield Finding(
            "ok",
            f"{has.hostname}: {has.cpus:g} CPUs, {has.memory / 2**30:.1f} GiB for sessions, GPUs: {listed or 'none'}",
        )
    except Error as error:
        yield Finding("error", error.message, error.hint)
    if has and offered and has.gpus != offered.gpus:
        had, now = ([gpu.id for gpu in each.gpus] for each in (offered, has))
        changes = [f"+{id}" for id in now if id not in had] + [f"-{id}" for id in had if id not in now]
        what = f"the GPUs are not those that the executor found when it started: {' '.join(changes) or 'other models'}"
        yield Finding("warning", what, "restart the executor, which ends no session: systemctl restart beaker-executor")
    yield from _nvidia(has)
    yield from vulnerabilities.installed()
    try:
        plan.check_places(settings.mount_paths)
    except Error as error:
        yield Finding("error", error.message, error.hint)
    for path in settings.mount_paths:
        if os.path.exists(path) and not os.path.isdir(path):
            yield Finding("error", f"{path} is no directory, so no session starts", "take it out of mountPaths")
        elif not os.path.isdir(path):
            what, asked = f"{path} is not there, so sessions do not see it", settings.mount_paths != MOUNTS
            yield Finding("warning", what, "mount it, or take it out of mountPaths") if asked else Finding("ok", what)
    free = shutil.disk_usage(settings.storage_path).free
    what = f"{free / 2**30:.1f} GiB are free in {settings.storage_path}"
    yield Finding("ok", what) if free > LOW_DISK else Finding("warning", what, "beaker executor images prune")


def _nvidia(has: inventory.Inventory | None) -> Iterable[Finding]:
    """Whether sessions can claim this machine's GPUs, and whether a GPU forgets everything when a session ends."""
    if not NVIDIA.exists():
        return
    if has and not any(gpu.id.startswith("nvidia.com/gpu=") for gpu in has.gpus):
        mend = "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
        yield Finding(
            "error", "this machine has NVIDIA GPUs but no CDI specification, so no session can claim them", mend
        )
    import pynvml

    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            mode = pynvml.nvmlDeviceGetPersistenceMode(pynvml.nvmlDeviceGetHandleByIndex(number))
            if mode != pynvml.NVML_FEATURE_ENABLED:
                what = f"GPU {number} is without persistence mode: each session waits for it to be initialised"
                yield Finding("warning", what, "systemctl enable --now nvidia-persistenced, or nvidia-smi -pm 1")
            else:
                yield Finding("ok", f"GPU {number} is in persistence mode")
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        yield Finding("warning", f"NVML does not answer, so the use of GPUs is unknown: {error}", "nvidia-smi")


def main() -> int:
    """For when no executor answers: the same findings, made by this process. Exit code 1 when there is an error."""
    from .main import sandboxes

    parser = argparse.ArgumentParser(description="Check this node without its executor.")
    parser.add_argument("--config")
    parser.add_argument("--format", choices=["json"])
    options = parser.parse_args()
    logging.disable()
    try:
        settings = load(ExecutorSettings, options.config)
        start = "systemctl restart beaker-executor, or make session; its log says why it ended"
        found = [Finding("error", f"no executor answers at {settings.socket}", start)]
        found += findings(settings, *sandboxes(settings), database=database(options.config))
    except Error as error:
        found = [Finding("error", error.message, error.hint)]
    for finding in found:
        text = f"{finding.level.upper():8}{finding.what}" + (f" -> {finding.mend}" if finding.mend else "")
        print(json.dumps(finding.__dict__) if options.format else text)
    return int(any(finding.level == "error" for finding in found))


if __name__ == "__main__":
    sys.exit(main())
