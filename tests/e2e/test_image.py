"""The default image as it is built on this machine, and `beaker` in one with an older Python."""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

from setup import recipe
from tests import images
from tests.e2e.conftest import Tty
from tests.stack import Stack, User, load_image

TOOLS = ("git --version", "git lfs version", "uv --version", "ssh -V", "tmux -V", "vim --version", "pip --version")


@pytest.fixture(scope="module")
def archive(debian: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001
    path = tmp_path_factory.mktemp("image") / "image.tar"
    images.default(path)
    return path


@pytest.fixture(scope="module")
def image(stack: Stack, archive: Path) -> str:
    if stack.driver == "docker":
        assert stack.docker_cli("load", "-i", str(archive)).returncode == 0
    else:
        load_image(stack.socket, archive, recipe.NAME)
    return recipe.NAME


def test_its_tools_run(ada: User, image: str):
    tools = TOOLS + (("aws --version",) if "awscli" in recipe.packages() else ())
    script = "; ".join(f"{tool} >/dev/null 2>&1 || echo {tool}" for tool in tools)
    done = ada.beaker("session", "create", "--gpus", "0", "--image", image, "--", "bash", "-c", script)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr


def test_the_prompt_the_greeting_and_the_command(ada: User, image: str, tty: type[Tty]):
    session = tty(ada, "session", "create", "--gpus", "2", "--timeout", "2h", "--image", image)
    id = session.expect(r"Session (\S+) on node-1\.lab: 2 GPUs, time limit 2:00:00\.\r\n") or session.match[1]
    session.expect_exact("exit or beaker session stop ends it.\r\n")
    session.expect_exact(f"[BEAKER] {ada.name} ~ $ ")
    session.sendline("beaker account whoami --quiet; git config --global credential.helper beaker; cd /tmp")
    session.expect(rf"\r{ada.name}\r\n")
    session.expect_exact(f"[BEAKER] {ada.name} /tmp $ ")
    session.sendline(
        "printf 'protocol=https\\nhost=h.lab\\nusername=ada\\npassword=sealed\\n' | git credential approve"
    )
    session.expect_exact(f"{ada.name} /tmp $ ")
    session.sendline("printf 'protocol=https\\nhost=h.lab\\n' | git credential fill")
    session.expect_exact("password=sealed\r\n")
    session.sendline("beaker session stop")
    session.end()
    assert ada.json("session", "get", id)[0]["status"]["finalized"]
    (ada.home / ".gitconfig").unlink()
    ada.beaker("secret", "delete", "-w", "git", "h.lab")


def test_an_update_is_small(archive: Path):
    """What changes with every version is the last layer alone, and less than a hundredth of the image."""
    with tarfile.open(archive) as tar:
        sizes = {member.name: member.size for member in tar}
        (manifest,) = json.load(tar.extractfile("manifest.json"))
        *below, top = [sizes[name] for name in manifest["Layers"]]
        with tarfile.open(fileobj=tar.extractfile(manifest["Layers"][-1])) as layer:
            last = set(layer.getnames())
    assert top < 2_000_000 < sum(below) / 100
    assert {"usr/local/bin/beaker", "usr/local/lib/beaker/beaker_sessions/cli/main.py"} <= last


def test_beaker_in_an_image_with_an_older_python(stack: Stack, ada: User, command: Path):
    """Python 3.9, of Debian 11."""
    try:
        stack.image("bullseye", images.bullseye())
    except subprocess.CalledProcessError:
        pytest.skip("needs a mirror of Debian 11")
    script = f"python3 --version; {command} account whoami --quiet; {command} session list --quiet"
    create = ("session", "create", "--gpus", "0", "--image", "bullseye")
    done = ada.beaker(*create, "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    version, who, id = done.stdout.decode().split("\n", 2)
    assert version.startswith("Python 3.9")
    assert (who, len(id.split())) == (ada.name, 1)
    assert re.fullmatch(r"[0-9A-Z]{26}", id.strip())
