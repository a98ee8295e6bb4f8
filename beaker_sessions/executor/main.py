"""`beaker-executor`: wires the parts of one node together and runs until it is told to stop, which ends no session."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import sys
from pathlib import Path

from .. import __version__
from ..errors import Error
from ..sandbox import Sandboxes
from ..settings import ExecutorSettings, load
from . import doctor, inventory
from .access import Access
from .door import Door
from .inside import Inside
from .ledger import Ledger
from .lifecycle import Lifecycle
from .report import Reporter
from .sessions import Sessions


def sandboxes(settings: ExecutorSettings) -> Sandboxes:
    """The driver that the settings name. Raises Error invalid."""
    state = Path(settings.storage_path, "executor", "sandboxes")
    cdi_paths = [Path(path) for path in settings.cdi_paths]
    if settings.driver == "docker":
        from ..sandbox.docker.driver import DockerSandboxes

        return DockerSandboxes(settings.docker_socket, state, settings.storage_path, cdi_paths)
    if settings.driver == "oci":
        from ..sandbox.oci.driver import OciSandboxes

        docker, bridge = settings.docker_socket, settings.bridge
        return OciSandboxes(state, settings.storage_path, cdi_paths, docker=docker, bridge=bridge)
    raise Error("invalid", f"driver: {settings.driver!r} is not one of: docker, oci", "correct the settings")


def main() -> int:
    parser = argparse.ArgumentParser(prog="beaker-executor", description="Runs the sessions of this machine.")
    parser.add_argument("--config", help="the settings, by default /etc/beaker/config.yml if it exists")
    parser.add_argument("--version", action="version", version=__version__)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        if os.geteuid() != 0:
            raise Error("forbidden", "the executor must run as root", "start it with sudo or through systemd")
        serve(load(ExecutorSettings, options.config))
    except Error as error:
        print(f"beaker-executor: {error.message}" + (f"; {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code
    return 0


def serve(settings: ExecutorSettings) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)  # before any thread: they inherit it
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    ledger = Ledger(Path(settings.storage_path, "executor", "ledger.db"))
    driver = sandboxes(settings)
    sessions = Sessions(ledger, inventory.read(settings))
    inside = Inside(Path(settings.socket).parent / "sessions", settings.address)
    lifecycle = Lifecycle(sessions, driver, settings, inside, owner=settings.storage_path)
    access = Access(ledger, settings.address, settings.accounts)
    reporter = Reporter(lifecycle, access, settings)
    door = Door(settings.socket, lifecycle, access, reporter.nodes, lambda: doctor.findings(settings, driver))
    door.listen()
    lifecycle.run()
    reporter.run()
    logging.getLogger(__name__).info("serving %s at %s", sessions.inventory.hostname, settings.socket)
    signal.sigwait(stop)
    ledger.close()


if __name__ == "__main__":
    sys.exit(main())
