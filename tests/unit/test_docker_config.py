"""What the Engine API is told, where no container shows it."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.model import Identity
from beaker_sessions.sandbox import Image, Spec
from beaker_sessions.sandbox.busybox import BUSYBOX
from beaker_sessions.sandbox.cdi import CdiMount, DeviceNode, Edits, Hook
from beaker_sessions.sandbox.docker import config, images
from beaker_sessions.sandbox.docker.check import is_static
from beaker_sessions.sandbox.docker.driver import DockerSandboxes

ADA = Identity("ada", 1500, 1500, "/home/ada", {1500: "ada"})
EDITS = Edits(
    env=("A=1",), nodes=(DeviceNode("/dev/a", "/dev/b"),), mounts=(CdiMount("/x", "/y", ("ro",)),), gids=(44,)
)


def _body(edits: Edits | None = None, **more: Any) -> dict[str, Any]:
    spec = Spec(id="X", labels={}, image=Image("sha256:0", "x"), identity=ADA, gpus=("v.com/gpu=0",), **more)
    return config.container(spec, Path("/state/X"), (), edits)


def test_engine_that_knows_cdi_is_given_names_only() -> None:
    host = _body()["HostConfig"]
    assert host["DeviceRequests"] == [{"Driver": "cdi", "DeviceIDs": ["v.com/gpu=0"]}]
    assert (host["Devices"], host["GroupAdd"]) == ([], [])


def test_an_exec_whose_start_is_uncertain_says_so() -> None:
    """The engine went away between the request and its answer."""
    driver = DockerSandboxes.__new__(DockerSandboxes)
    driver.engine = MagicMock()
    driver.engine.call.return_value = {"Id": "handle"}
    driver.engine.hijack.side_effect = Error("unavailable", "the engine went away")
    with pytest.raises(Error, match=r"the engine went away.*may have run"):
        driver.exec("X", ("make",), env={}, identity=ADA, workdir="/", size=None, stdin=False)


def test_engine_that_does_not_is_given_the_edits() -> None:
    body = _body(EDITS)
    host = body["HostConfig"]
    assert "DeviceRequests" not in host
    assert host["Devices"] == [{"PathOnHost": "/dev/b", "PathInContainer": "/dev/a", "CgroupPermissions": "rwm"}]
    assert {"Type": "bind", "Source": "/x", "Target": "/y", "ReadOnly": True} in host["Mounts"]
    assert (host["GroupAdd"], "A=1" in body["Env"]) == (["44"], True)


def test_hooks_need_an_engine_that_knows_cdi() -> None:
    edits = Edits(hooks=(Hook("createContainer", "/bin/true"),))
    with pytest.raises(Error) as error:
        _body(edits)
    assert (error.value.code, "v.com/gpu=0" in error.value.message) == ("unavailable", True)


def test_weights_are_docker_s_shares() -> None:
    assert [_body(cpu_weight=w)["HostConfig"]["CpuShares"] for w in (1, 100, 10000)] == [10, 1024, 102400]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("debian", "debian:latest"),
        ("docker://a/b", "a/b:latest"),
        ("beaker://ada/tool:2", "ada/tool:2"),
        ("localhost:5000/x", "localhost:5000/x:latest"),
        ("x@sha256:00", "x@sha256:00"),
    ],
)
def test_references(typed: str, meant: str) -> None:
    assert images.normalise(typed) == meant


def test_static_programs_are_told_from_others() -> None:
    assert not is_static(Path("/bin/ls").read_bytes())
    with pytest.raises((ValueError, struct.error)):
        is_static(b"#!/bin/sh\n")


def test_busybox_is_static() -> None:
    if not Path(BUSYBOX).exists():
        pytest.skip(f"needs {BUSYBOX} (busybox-static)")
    assert is_static(Path(BUSYBOX).read_bytes())
