"""CDI specs: what is read, what is reported, and which of the devices are GPUs to claim."""

from __future__ import annotations

import json
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
    spec["devices"][0]["containerEdits"] |= {
        "mounts": [{"hostPath": "/usr/bin/nvidia-smi", "containerPath": "/usr/bin/nvidia-smi", "options": ["ro"]}],
        "hooks": [{"hookName": "createContainer", "path": "/usr/bin/nvidia-ctk", "args": ["nvidia-ctk", "hook"]}],
        "additionalGids": [44],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(spec))
    edits = cdi.load([tmp_path]).edits(["nvidia.com/gpu=0", "nvidia.com/gpu=1"])
    assert [node.path for node in edits.nodes] == ["/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia1"]
    assert (edits.env, edits.gids) == (("NVIDIA_VISIBLE_DEVICES=void",), (44,))
    assert edits.mounts[0].options == ("ro",)
    assert edits.hooks[0].args == ("nvidia-ctk", "hook")


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
