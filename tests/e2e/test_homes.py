"""Homes that are full, that do not exist yet, and that only their user may enter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from tests.stack import REPOSITORY, Stack, User

CREATE = ("session", "create", "--gpus", "0")


@pytest.fixture
def dora(stack: Stack) -> Iterator[User]:
    """A user whose home is a file system of its own, of 4 MiB."""
    user = stack.user(f"dora{os.urandom(2).hex()}")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=4m,mode=700,uid={user.uid}", "tmpfs", user.home], check=True)
    user.login(user.token)
    yield user
    stack.settle()
    subprocess.run(["umount", user.home], check=True)


def test_a_full_home_is_said_and_ends_nothing(dora: User):
    filler = dora.home / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass
    script = "echo begun; echo more > ~/new; echo code=$?; rm ~/filler; echo more > ~/new && cat ~/new"
    done = dora.beaker(*CREATE, "--", "bash", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"begun\ncode=1\nmore\n"
    assert f"warning: your home {dora.home} is full" in done.stderr.decode()
    assert b"No space left on device" in done.stderr
    assert b"warning" not in dora.beaker(*CREATE, "--", "true").stderr


@pytest.fixture
def roaming(stack: Stack) -> Iterator[Path]:
    """`sessionHome` in the settings of the executor: the directory of roaming homes."""
    homes = stack.root / "homes"
    homes.mkdir(mode=0o755)
    before = stack.config.read_text()
    stack.config.write_text(yaml.safe_dump(yaml.safe_load(before) | {"sessionHome": str(homes)}))
    stack.executor.kill()
    stack.start_executor()
    yield homes
    stack.settle()
    stack.config.write_text(before)
    stack.executor.kill()
    stack.start_executor()
    shutil.rmtree(homes)


def test_roaming_homes_are_made_for_their_users(ada: User, bob: User, roaming: Path):
    script = 'echo "$HOME" ~ "$PWD"; echo kept > ~/file; stat -c "%U %G %a" ~'
    done = ada.beaker(*CREATE, "--", "bash", "-c", script)
    own = roaming / ada.name
    assert done.stdout.decode() == f"{own} {own} {own}\n{ada.name} {ada.name} 700\n", done.stderr
    assert ada.beaker(*CREATE, "--", "cat", str(own / "file")).stdout == b"kept\n"
    assert not (ada.home / "file").exists()
    assert ((own / "file").stat().st_uid, own.stat().st_mode & 0o777) == (ada.uid, 0o700)
    assert bob.beaker(*CREATE, "--", "cat", str(own / "file")).returncode == 1

    # Made by others beforehand, it is taken as it is, and nobody else's is.
    (roaming / bob.name).rmdir()
    (roaming / bob.name).mkdir(mode=0o700)
    refused = bob.beaker(*CREATE, "--", "true")
    assert (refused.returncode, b"cannot enter the home" in refused.stderr) == (77, True)
    (roaming / bob.name).rmdir()
    (roaming / bob.name).symlink_to(own)
    assert bob.beaker(*CREATE, "--", "true").returncode == 77
    (roaming / bob.name).unlink()
    roaming.rename(roaming.with_name("away"))
    gone = bob.beaker(*CREATE, "--", "true")
    assert (gone.returncode, b"the directory of homes" in gone.stderr) == (66, True), gone.stderr
    roaming.with_name("away").rename(roaming)


def test_without_roaming_homes_a_missing_one_is_an_error(stack: Stack):
    user = stack.user(f"eve{os.urandom(2).hex()}")
    user.home.rename(user.home.with_name("moved"))
    token = {"BEAKER_TOKEN": user.token}
    done = user.beaker(*CREATE, "--", "true", env=token, cwd="/")
    assert (done.returncode, b"does not exist" in done.stderr, b"--bare" in done.stderr) == (66, True, True)
    assert user.beaker(*CREATE, "--bare", "--", "true", env=token, cwd="/").returncode == 0
    user.home.with_name("moved").rename(user.home)


@pytest.fixture
def squashed(stack: Stack) -> Iterator[User]:
    """A user whose home lets nobody else in, root included."""
    user = stack.user(f"fay{os.urandom(2).hex()}")
    user.home.chmod(0o700)
    below = user.home.with_name(f"{user.name}-exported")
    user.home.rename(below)
    user.home.mkdir()
    command = [sys.executable, "-m", "tests.squash", str(below), str(user.home)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as server:
        assert server.stdout
        assert server.stdout.readline() == b"mounted\n"
        yield user
        stack.settle()
        subprocess.run(["umount", user.home], check=True)


def test_a_home_that_root_may_not_enter(squashed: User):
    with pytest.raises(PermissionError):
        list(squashed.home.iterdir())
    script = "cd && echo mine > file && stat -c '%U %a' file . && echo $PWD"
    done = squashed.beaker(*CREATE, "--", "bash", "-c", script, cwd="/")
    assert done.stdout.decode() == f"{squashed.name} 644\n{squashed.name} 700\n{squashed.home}\n", done.stderr
    assert squashed.run("cat", f"{squashed.home}/file", cwd="/").stdout == b"mine\n"
    assert squashed.beaker(*CREATE, "--", "cat", "file", cwd="/").stdout == b"mine\n"  # as the working directory
