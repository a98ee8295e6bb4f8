"""`beaker-executor`: wires the parts of one node together and runs until it is told to stop, which ends no session."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path

from .. import __version__, trust
from ..errors import Error
from ..sandbox import IMAGES, Sandboxes, delegated, firewall
from ..settings import ExecutorSettings, load
from . import admission, doctor, exposition, fence, images, inventory, plan, ports
from .access import Access, trusted
from .disk import Disk
from .door import Door
from .inside import Inside
from .ledger import Ledger
from .lifecycle import Lifecycle
from .loop import Loop
from .metrics import Metrics
from .report import Reporter
from .sessions import Sessions

DRIVERS = ("oci", "docker")
TRIAL = 16 << 20  # bytes that a trial of the driver may need
STOP_GRACE = 30  # seconds: a shutdown waits no longer, and neither does whoever stops a session

log = logging.getLogger(__name__)


def sandboxes(settings: ExecutorSettings, used: str = "", before: str = "") -> tuple[Sandboxes, str]:
    """The driver for this node, and why it is not the other.

    `driver: auto` takes `oci` where it can run, else `docker`. used: the driver of live sessions; they keep it.
    before: the one of the last start, which is taken where the disk is too full to try one.
    Raises Error when the settings name a driver that cannot run here.
    """
    if settings.driver not in ("auto", *DRIVERS):
        raise Error("invalid", f"driver: {settings.driver!r} is not one of: auto, oci, docker", "correct the settings")
    said = "the settings say so"
    wanted = settings.driver
    if wanted == "auto" and used:
        wanted, said = used, "live sessions use it"
    if wanted == "docker":
        return _docker(settings), said
    from ..sandbox.oci.command import problem

    if wanted == "oci" and used == "oci":
        return _oci(settings), said  # whatever new sessions may lack, it has live ones; doctor says what is wrong
    Path(settings.storage_path).mkdir(parents=True, exist_ok=True)
    disk = os.statvfs(settings.storage_path)
    if before == "oci" and disk.f_bfree * disk.f_frsize < TRIAL:
        return _oci(settings), f"the disk of {settings.storage_path} is full, and it was used before"
    found = problem(Path(settings.storage_path))
    if not found:
        passes = "a trial of it passes here, and it is preferred to Docker Engine"
        return _oci(settings), said if wanted == "oci" else passes
    why = f"oci cannot run here: {found.what}"
    if wanted == "oci":
        raise Error("unavailable", why, found.mend or "set driver: docker")
    log.warning("%s; sessions are run by Docker Engine", why)
    return _docker(settings), why


def _known(settings: ExecutorSettings, ledger: Ledger) -> tuple[str, str]:
    """The driver of live sessions and that of the last start; "" for none. A ledger that was lost knows neither."""
    before = ledger.fact("driver") or ""
    if before in DRIVERS and not ledger.damage:
        return before if ledger.live() else "", before
    with suppress(OSError):
        if any(Path(settings.storage_path, "executor", "oci", "sessions").iterdir()):
            return "oci", "oci"
    with suppress(Error):
        if os.path.exists(settings.docker_socket) and _docker(settings).list():
            return "docker", "docker"
    return "", before


def _oci(settings: ExecutorSettings) -> Sandboxes:
    from ..sandbox.oci import userns
    from ..sandbox.oci.driver import OciSandboxes

    state = Path(settings.storage_path, "executor", "oci")
    return OciSandboxes(
        state, settings.storage_path, settings.cdi_paths, docker=settings.docker_socket, bridge=settings.bridge,
        images=Path(settings.image_path, IMAGES) if settings.image_path else None, limits=images.limits(settings),
        realms=settings.registry_realms, access=settings.session_access, ids=userns.interval(settings.subordinate_ids),
        cdi_hooks=settings.cdi_hooks,
    )  # fmt: skip


def _docker(settings: ExecutorSettings) -> Sandboxes:
    from ..sandbox.docker.driver import DockerSandboxes

    state = Path(settings.storage_path, "executor", "docker")
    cdi_paths = [Path(path) for path in settings.cdi_paths]
    limit = images.limits(settings).image
    return DockerSandboxes(
        settings.docker_socket,
        state,
        settings.storage_path,
        cdi_paths,
        cdi_hooks=settings.cdi_hooks,
        image_size=limit,
        bridge=settings.bridge,
        access=settings.session_access,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="beaker-executor", description="Runs the sessions of this machine.")
    parser.add_argument("--config", help="the settings, by default /etc/beaker/config.yml if it exists")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        if os.geteuid() != 0:
            raise Error("forbidden", "the executor must run as root", "start it with sudo or through systemd")
        trust.check("the executor")
        serve(load(ExecutorSettings, options.config), doctor.database(options.config))
    except Error as error:
        print(f"beaker-executor: {error.message}" + (f"; {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


def serve(settings: ExecutorSettings, database: Path | None) -> None:
    """Run until SIGTERM or SIGINT. database: this machine's server's, for doctor. Raises Error when it cannot begin."""
    plan.check_places(settings.mount_paths)
    if not 0 <= settings.stop_grace <= STOP_GRACE:
        what = f"stopGrace: {settings.stop_grace} is not a number of seconds from 0 to {STOP_GRACE}"
        raise Error("invalid", what, "correct the settings")
    server = settings.endpoint
    limits, creates = admission.Limits.of(settings), trusted(settings)
    firewall.rules(settings.bridge, "", (), settings.session_access)  # says what is wrong with them
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before any thread: they inherit it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    fence.hold(Path(settings.storage_path, "executor", "lock"))
    delegated.take_over()
    ledger = Ledger(Path(settings.storage_path, "executor", "ledger.db"))
    ledger.on_damage = lambda _: os.kill(os.getpid(), signal.SIGTERM)  # the next start mends it
    driver, why = sandboxes(settings, *_known(settings, ledger))
    ledger.note("driver", driver.name)
    sessions = Sessions(ledger, inventory.read(settings), limits, ports.of(settings))
    loop = Loop()
    inside = Inside(loop, Path(settings.socket).parent / "sessions", server, driver.init)
    lifecycle = Lifecycle(sessions, driver, settings, inside, owner=settings.storage_path)
    images.guard(lifecycle)
    access = Access(ledger, server, settings.accounts, creates)
    disk = Disk(sessions, driver, settings)
    metrics = Metrics(sessions, driver, settings.storage_path, disk.use)
    reporter = Reporter(lifecycle, access, settings, metrics)
    findings = functools.partial(doctor.findings, settings, driver, why, sessions.inventory, database)
    door = Door(loop, settings.socket, lifecycle, access, reporter.nodes, findings, metrics.last)
    loop.start()
    door.listen()
    lifecycle.run()
    disk.run()
    metrics.run()
    reporter.run()
    if settings.metrics:
        exposition.serve(settings.metrics, sessions, metrics.last, lambda: reporter.heard)
    log.info("serving %s at %s, driver %s", sessions.inventory.hostname, settings.socket, driver.name)
    signal.sigwait(stop)
    if loop.failure:
        raise Error("internal", f"the door has failed: {loop.failure!r}", "start the executor again; sessions go on")
    if ledger.is_damaged:
        raise Error("internal", ledger.damage, "start the executor again, which mends it; sessions go on")
    # Neither lock nor ledger is closed: threads go on until the process ends, all that is in the ledger is on the disk,
    # and SQLite, when it closes one, gives back the room of its log.
    loop.passing.kill()


if __name__ == "__main__":
    sys.exit(main())
