"""`make down` and `make clean`: stop what set-up started, and remove the state that it made. Never anything else."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from . import driver, engine, everyone, host, installed, services


def down() -> None:
    """Stop executor, server, and Docker Engine if set-up started it; only the last ends sessions."""
    _stop_services()
    if left := driver.sessions():
        _say(f"{_count(left)} still running: `make session` finds them again, `make clean` ends them")
    driver.forget()
    _stop_engine()


def clean() -> None:
    """Stop everything, and remove sessions' containers, state, logs, tokens, units, and the checkout's built parts."""
    _stop_services()  # first, so that nothing is made anew
    if driver.remove():
        _say("ended the sessions, and removed their network")
    if engine.running():
        for container in engine.containers(stopped=True):
            engine.call("DELETE", f"/containers/{container}?force=1&v=1")
            _say(f"removed container {container[:12]}")
        for network in engine.networks():
            engine.call("DELETE", f"/networks/{network}")
            subprocess.run(["nft", "delete", "table", "inet", network], stderr=subprocess.DEVNULL)
            _say(f"removed network {network}")
    _remove_images()
    _stop_engine()
    if services.SETTINGS.exists() and services.SETTINGS.read_bytes() == services.EXAMPLE.read_bytes():
        _remove(services.SETTINGS)
    for service in (services.EXECUTOR, services.SERVER):
        service.remove_units()
    for file in host.ETC.glob("*.token"):
        _remove(file)
    for directory in (host.RUN / "sessions").glob("*/"):  # file systems in memory: their sessions are gone
        subprocess.run(["umount", "--lazy", directory], stderr=subprocess.DEVNULL)
    sockets = [path for end in ("sock", "lock") for path in host.RUN.glob(f"server-*.{end}")]
    for path in (
        *sockets,
        host.RUN / "setup",
        host.RUN / "sessions",
        services.DOOR,
        host.STATE,
        host.LOGS,
        installed.BASE,
    ):
        _remove(path)
    for path in (host.VENV, host.ROOT / "build"):
        _remove(path)
    for path in everyone.remove():
        _say(f"removed {path}")
    for directory in (host.RUN / "oci", host.RUN, host.ETC):  # of other executors there may be something left
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _remove_images() -> None:
    if disk := services.setting("imagePath", ""):  # what else is on it is somebody's
        _remove(Path(disk, "beaker-images"))  # as `beaker_sessions.sandbox.IMAGES`


def _stop_services() -> None:
    for service in (services.EXECUTOR, services.SERVER):
        if service.stop(_say):
            _say(f"stopped the {service.description}")


def _stop_engine() -> None:
    stopped = engine.stop()
    if stopped is not None:
        _say(f"stopped Docker Engine, and with it {_count(stopped)}" if stopped else "stopped Docker Engine")
    elif engine.running() and (left := len(engine.containers())):
        _say(f"{_count(left)} still running: Docker Engine is not ours to stop; `make session` finds them again")


def _count(sessions: int) -> str:
    return f"{sessions} session{'s' * (sessions != 1)}"


def _remove(path: Path) -> None:
    """Remove a file or a directory, but never through a mount: below may be somebody's home."""
    if not path.exists() and not path.is_symlink():
        return
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]  # proc(5)
    inside = [mount for mount in mounts if Path(mount).is_relative_to(path)]
    if inside:
        _say(f"{path} stays: {', '.join(inside)} is mounted there")
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        _say(f"removed {path}")
    else:
        path.unlink()
        _say(f"removed {path}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
