"""What doctor and the choice of the driver rest on: a trial of what a session needs, on this very machine."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor import main
from beaker_sessions.executor.main import sandboxes
from beaker_sessions.sandbox.busybox import BUSYBOX
from beaker_sessions.sandbox.oci import cgroups, check, command, trial
from beaker_sessions.sandbox.oci.driver import RUN
from beaker_sessions.settings import ExecutorSettings

from .conftest import OciLab


def left_behind() -> list[str]:
    mounted = Path("/proc/self/mountinfo").read_text().splitlines()
    groups = [name for name in cgroups.detect().children("/") if name.startswith("beaker-trial")]
    return groups + [line for line in mounted if "/run/trial-" in line] + [p.name for p in Path("/run").glob("trial-*")]


def test_what_runs_here_passes(oci_lab: OciLab) -> None:
    found = oci_lab.sandboxes.check()
    assert [finding for finding in found if finding.level == "error"] == []
    for word in ("starts containers", "cgroups version", "conmon", "subordinate ids", "AppArmor", "static"):
        assert any(word in finding.what for finding in found), word
    assert not list((oci_lab.state / "trash").iterdir())
    assert left_behind() == []


@pytest.mark.parametrize(("instances", "warned"), [(128, True), (1024, False)])
def test_few_inotify_instances_are_told(
    instances: int, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "instances").write_text(f"{instances}\n")
    monkeypatch.setattr(check, "INSTANCES", tmp_path / "instances")
    assert any("inotify" in one.what and "sysctl" in one.mend for one in check._kernel()) == warned


@pytest.mark.usefixtures("oci_lab")
@pytest.mark.parametrize("name", ["runc", "crun"])
def test_a_runtime_is_judged_by_trying_it(name: str, tmp_path: Path) -> None:
    """crun refuses cgroups of both versions; where it does, doctor must say so before a session fails."""
    runtime, found = shutil.which(name), cgroups.detect()
    if not runtime:
        pytest.skip(f"needs {name}")
    if name == "crun" and not found.unified:
        with pytest.raises(Error, match="cgroups") as error:
            trial.run(runtime, BUSYBOX, found, tmp_path)
        assert error.value.code == "unavailable"
    else:
        trial.run(runtime, BUSYBOX, found, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert left_behind() == []


@pytest.fixture
def unmappable(tmp_path: Path) -> Iterator[Path]:
    """A file system whose owners cannot be mapped."""
    subprocess.run(["mount", "-t", "ramfs", "none", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.usefixtures("oci_lab")
def test_without_idmapped_layers_docker_engine_is_used_and_doctor_says_why(unmappable: Path) -> None:
    problem = command.problem(unmappable)
    assert problem
    assert problem.what.startswith("no idmapped layers")
    assert list(unmappable.iterdir()) == []
    settings = ExecutorSettings(
        storage_path=str(unmappable), docker_socket=str(unmappable / "none.sock"), bridge="bt-no"
    )
    driver, why = sandboxes(settings)
    assert driver.name == "docker"
    assert why.startswith("oci cannot run here: no idmapped layers")
    assert not (RUN / "bt-no").exists()


@pytest.mark.usefixtures("oci_lab")
def test_live_sessions_keep_their_driver_whatever_it_lacks_now(
    unmappable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "_oci", lambda _: "the oci driver")
    assert sandboxes(ExecutorSettings(storage_path=str(unmappable)), "oci") == (
        "the oci driver",
        "live sessions use it",
    )


@pytest.mark.usefixtures("oci_lab")
def test_a_driver_that_is_asked_for_and_cannot_run_is_an_error(unmappable: Path) -> None:
    settings = ExecutorSettings(storage_path=str(unmappable), driver="oci", bridge="bt-no")
    with pytest.raises(Error) as error:
        sandboxes(settings)
    assert (error.value.code, "idmapped" in error.value.message) == ("unavailable", True)
