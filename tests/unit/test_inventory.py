"""What is mounted is what the user may open, resolved with the user's rights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.executor import inventory
from beaker_sessions.model import Identity
from beaker_sessions.settings import ExecutorSettings

NOBODY = Identity("someone", 54321, 54321, "/", {54321: "someone"})


@pytest.fixture
def open_path(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        pytest.skip("needs root, to open files as somebody else")
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_mode & 0o001 == 0:
            parent.chmod(0o711)
    return tmp_path


def test_a_directory_is_pinned_even_if_another_takes_its_name(open_path: Path):
    home = open_path / "home"
    home.mkdir()
    (home / "mine").touch()
    descriptor = inventory.pin(str(home), NOBODY)
    home.rename(open_path / "moved")
    home.mkdir()
    assert os.listdir(f"/proc/self/fd/{descriptor}") == ["mine"]
    os.close(descriptor)


def test_a_link_leads_only_where_the_user_may_go(open_path: Path):
    shut = open_path / "shut"
    (shut / "inner").mkdir(parents=True)
    shut.chmod(0o700)
    (open_path / "link").symlink_to(shut / "inner")
    with pytest.raises(PermissionError):
        inventory.pin(str(open_path / "link"), NOBODY)
    assert os.geteuid() == 0
    os.close(os.open(shut / "inner", os.O_RDONLY))  # this thread has kept its own rights


def test_supplementary_groups_open_doors(open_path: Path):
    shared = open_path / "shared"
    (shared / "inner").mkdir(parents=True)
    os.chown(shared, 0, 50001)
    shared.chmod(0o750)
    with pytest.raises(PermissionError):
        inventory.pin(str(shared / "inner"), NOBODY)
    member = Identity("someone", 54321, 54321, "/", {54321: "someone", 50001: "lab"})
    os.close(inventory.pin(str(shared / "inner"), member))


def test_unknown_uid():
    with pytest.raises(Error) as refused:
        inventory.unix_user(3_999_999_999)
    assert refused.value.code == "not_found"


def test_roaming_homes_take_the_place_of_ones_own():
    assert inventory.unix_user(0).home == "/root"
    assert inventory.unix_user(0, "/net/homes").home == "/net/homes/root"


def test_a_gpu_that_no_specification_names(tmp_path: Path):
    with pytest.raises(Error, match=r"resources\.gpus names nvidia\.com/gpu=7"):
        inventory.read(ExecutorSettings(gpus=["nvidia.com/gpu=7"], cdi_paths=[str(tmp_path)]))
