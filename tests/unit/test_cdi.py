"""CDI specs: what is read, what is reported, and which of the devices are GPUs to claim."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from beaker_sessions.errors import Error
from beaker_sessions.sandbox import cdi


def _spec(kind: str = "nvidia.com/gpu", **devices: list[str]) -> dict[str, Any]:
    """Devices by name (an underscore for a dash) and their nodes."""
    return {
        "cdiVersion": "0.6.0",
        "kind": kind,
        "containerEdits": {"deviceNodes": [{"path": "/dev/nvidiactl"}], "env": ["NVIDIA_VISIBLE_DEVICES=void"]},
        "devices": [
            {
                "name": name.removeprefix("n").replace("_", "-"),
                "containerEdits": {"deviceNodes": [{"path": node} for node in nodes]},
            }
            for name, nodes in devices.items()
        ],
    }


def _program(path: Path) -> str:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_one_gpu_has_one_name(tmp_path: Path) -> None:
    """As `nvidia-ctk cdi generate` writes it on a machine with two GPUs."""
    a, b = ["/dev/nvidia0", "/dev/dri/card1"], ["/dev/nvidia1", "/dev/dri/card2"]
    spec = _spec(n0=a, n1=b, GPU_1111=a, GPU_2222=b, all=a + b)
    (tmp_path / "nvidia.yaml").write_text(yaml.safe_dump(spec))
    registry = cdi.load([tmp_path])
    assert cdi.gpus(registry) == ["nvidia.com/gpu=0", "nvidia.com/gpu=1"]
    assert cdi.aliases(registry, "nvidia.com/gpu=GPU-2222") == ("nvidia.com/gpu=1", "nvidia.com/gpu=GPU-2222")
    assert cdi.aliases(registry, "nvidia.com/gpu=all") == ()


def test_all_is_the_gpu_where_there_is_one(tmp_path: Path) -> None:
    spec = _spec(all=["/dev/nvidia0"], GPU_1111=["/dev/nvidia0"], n0=["/dev/nvidia0"])
    (tmp_path / "nvidia.json").write_text(json.dumps(spec))
    assert cdi.gpus(cdi.load([tmp_path])) == ["nvidia.com/gpu=0"]


def test_order_is_natural_and_other_classes_are_no_gpus(tmp_path: Path) -> None:
    gpus = {f"n{n}": [f"/dev/nvidia{n}"] for n in (10, 9, 2)}
    (tmp_path / "gpu.json").write_text(json.dumps(_spec(**gpus)))
    (tmp_path / "nic.json").write_text(json.dumps(_spec("example.com/nic", n0=["/dev/nic0"])))
    registry = cdi.load([tmp_path])
    assert cdi.gpus(registry) == ["nvidia.com/gpu=2", "nvidia.com/gpu=9", "nvidia.com/gpu=10"]
    assert "example.com/nic=0" in registry.devices


def test_edits_of_two_devices_hold_the_common_ones_once(tmp_path: Path) -> None:
    spec = _spec(n0=["/dev/nvidia0"], n1=["/dev/nvidia1"])
    program = _program(tmp_path / "nvidia-ctk")
    spec["devices"][0]["containerEdits"] |= {
        "mounts": [{"hostPath": "/usr/bin/nvidia-smi", "containerPath": "/usr/bin/nvidia-smi", "options": ["ro"]}],
        "hooks": [{"hookName": "createContainer", "path": program, "args": ["nvidia-ctk", "hook", "chmod"]}],
        "additionalGids": [44],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(spec))
    edits = cdi.load([tmp_path]).edits(["nvidia.com/gpu=0", "nvidia.com/gpu=1"])
    assert [node.path for node in edits.nodes] == ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia1"]
    assert (edits.env, edits.gids) == (("NVIDIA_VISIBLE_DEVICES=void",), (44,))
    assert edits.mounts[0].options == ("ro",)
    assert edits.hooks[0].args == ("nvidia-ctk", "hook", "chmod")


def test_unknown_device(tmp_path: Path) -> None:
    with pytest.raises(Error) as error:
        cdi.load([tmp_path, tmp_path / "missing"]).edits(["nvidia.com/gpu=7"])
    assert (error.value.code, "nvidia.com/gpu=7" in error.value.message) == ("not_found", True)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "",
        json.dumps(_spec() | {"cdiVersion": "9.0.0", "devices": [{"name": "0", "containerEdits": {}}]}),
        json.dumps(_spec()),
        json.dumps(_spec("gpu", n0=["/dev/a"])),
        json.dumps(_spec(n0=["dev/a"])),
        json.dumps(_spec() | {"devices": [{"name": "0", "containerEdits": {"deviceNodes": [{}]}}]}),
        json.dumps(_spec() | {"devices": [{"name": "0", "containerEdits": {"env": ["NAME"]}}]}),
        json.dumps(_spec() | {"devices": [{"name": "0", "containerEdits": []}]}),
        json.dumps(_spec() | {"devices": [{"name": "0"}, {"name": "0"}]}),
        json.dumps(_spec() | {"devices": [{"name": "../0"}]}),
        "\0",
    ],
)
def test_broken_spec_is_reported_and_the_others_count(tmp_path: Path, text: str) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    (tmp_path / "good.json").write_text(json.dumps(_spec("amd.com/gpu", n0=["/dev/dri/renderD128"])))
    registry = cdi.load([tmp_path])
    assert cdi.gpus(registry) == ["amd.com/gpu=0"]
    assert [finding.level for finding in registry.findings] == ["error"]
    assert "broken.yaml" in registry.findings[0].what


def test_later_directory_wins_and_twice_in_one_is_nobody_s(tmp_path: Path) -> None:
    etc, run = tmp_path / "etc", tmp_path / "run"
    for directory, node in ((etc, "/dev/old"), (run, "/dev/new")):
        directory.mkdir()
        (directory / "a.json").write_text(json.dumps(_spec(n0=[node])))
    assert cdi.load([etc, run]).devices["nvidia.com/gpu=0"].own.nodes[0].path == "/dev/new"
    (run / "b.json").write_text(json.dumps(_spec(n0=["/dev/other"])))
    registry = cdi.load([etc, run])
    assert (cdi.gpus(registry), registry.findings[0].level) == ([], "error")


def _refused(directory: Path, hooks: tuple[str, ...] = ()) -> str:
    """Why the one spec there does not count, "" where it does."""
    registry = cdi.load([directory], hooks)
    assert bool(registry.devices) != bool(registry.findings)
    assert all(finding.level == "error" for finding in registry.findings)
    return registry.findings[0].what if registry.findings else ""


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_spec_that_others_can_write_does_not_count(tmp_path: Path, mode: int) -> None:
    """It gives any file of the machine to a session, and runs programs."""
    path = tmp_path / "cdi" / "gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps(_spec(n0=["/dev/nvidia0"])))
    path.chmod(0o644)
    assert not _refused(path.parent)
    path.chmod(mode)
    _to_another_group(path)
    assert f"can write {path}" in _refused(path.parent)


@pytest.mark.parametrize("mode", [0o775, 0o777])
def test_nor_one_below_a_directory_that_others_can_write(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "above" / "cdi" / "gpu.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(_spec(n0=["/dev/nvidia0"])))
    path.parent.parent.chmod(mode)
    _to_another_group(path.parent.parent)
    assert f"can write {path.parent.parent}" in _refused(path.parent)
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    assert f"can write {path.parent.parent}" in _refused(link)
    path.parent.parent.chmod(0o755)
    assert not _refused(link)


def _to_another_group(path: Path) -> None:
    """Than root's; a user's is another already."""
    if os.geteuid() == 0:
        os.chown(path, -1, 1500)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make what belongs to others")
def test_nor_one_on_whose_way_is_somebody_elses_link(tmp_path: Path) -> None:
    """A link to a link: the second was in a directory that nobody looked at."""
    path = tmp_path / "cdi" / "gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps(_spec(n0=["/dev/nvidia0"])))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/second").symlink_to(path.parent)
    (tmp_path / "first").symlink_to(tmp_path / "theirs/second")
    assert not _refused(tmp_path / "first")
    os.chown(tmp_path / "theirs", 1500, 1500)
    assert "theirs belongs to uid 1500" in _refused(tmp_path / "first")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make what belongs to others")
@pytest.mark.parametrize("whose", ["gpu.json", ".", "..", "link"])
def test_nor_one_that_belongs_to_somebody_else(tmp_path: Path, whose: str) -> None:
    path = tmp_path / "above" / "cdi" / "gpu.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(_spec(n0=["/dev/nvidia0"])))
    link = tmp_path / "link"
    link.symlink_to(path.parent)
    os.chown(link if whose == "link" else path.parent / whose, 1500, 1500, follow_symlinks=False)
    assert "belongs to uid 1500" in _refused(link)


def _hooked(directory: Path, **hook: Any) -> Path:
    spec = _spec(n0=["/dev/nvidia0"])
    spec["containerEdits"]["hooks"] = [{"hookName": "createContainer", **hook}]
    cdi_path = directory / "cdi"
    cdi_path.mkdir(exist_ok=True)
    (cdi_path / "gpu.json").write_text(json.dumps(spec))
    return cdi_path


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (["nvidia-ctk", "hook", "update-ldcache", "--folder", "/usr/lib"], "nvidia-ctk"),
        (["nvidia-cdi-hook", "create-symlinks", "--link", "a::b"], "nvidia-cdi-hook"),
        (["nvidia-cdi-hook", "enable-cuda-compat"], "nvidia-cdi-hook"),
    ],
)
def test_hooks_of_nvidias_toolkit_are_known(tmp_path: Path, args: list[str], name: str) -> None:
    assert not _refused(_hooked(tmp_path, path=_program(tmp_path / name), args=args))


@pytest.mark.parametrize(
    "hook",
    [
        {"args": ["nvidia-ctk", "runtime", "configure"]}, {"args": ["nvidia-ctk"]}, {"args": []},
        {"args": ["nvidia-ctk", "hook", "exec"]}, {"hookName": "startContainer"}, {"hookName": "prestart"},
        {"hookName": "createRuntime"}, {"path": "/bin/sh", "args": ["nvidia-ctk", "hook", "chmod"]},
        {"path": "nvidia-ctk"}, {"path": "/no/such/nvidia-ctk"}, {"path": "/etc"}, {"path": 3}, {"args": [1]},
        {"timeout": "1"}, {"env": [None]},
    ],
)  # fmt: skip
def test_any_other_hook_is_refused(tmp_path: Path, hook: dict[str, Any]) -> None:
    good = {"path": _program(tmp_path / "nvidia-ctk"), "args": ["nvidia-ctk", "hook", "chmod"]}
    assert not _refused(_hooked(tmp_path, **good))
    assert _refused(_hooked(tmp_path, **good | hook))


def test_a_hook_is_roots_program_and_may_be_named_in_the_settings(tmp_path: Path) -> None:
    program = Path(_program(tmp_path / "own-hook"))
    directory = _hooked(tmp_path, path=str(program), args=["own-hook", "anything"], hookName="createRuntime")
    assert "cdiHooks" in _refused(directory)
    assert not _refused(directory, (str(program),))
    program.chmod(0o757)
    assert f"everybody can write {program}" in _refused(directory, (str(program),))
    program.chmod(0o755)
    _hooked(tmp_path, path=str(program), hookName="startContainer")  # its program would be the image's
    assert _refused(directory, (str(program),))
