"""`beaker credential`: Git's protocol, spoken by the command to a real server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from beaker_sessions.client import Client

SITE = "protocol=https\nhost=git.lab\n"


@pytest.fixture
def git(server: SimpleNamespace, tmp_path: Path) -> Callable[[str, str], str]:
    """What the helper says to Git: `git(operation, input)`, as ann."""

    def run(operation: str, said: str) -> str:
        command = [sys.executable, "-m", "beaker_sessions.cli", "credential", operation]
        environment = {
            "BEAKER_ADDR": server.address,
            "BEAKER_TOKEN": server.ann,
            "BEAKER_INSECURE_ADDRESSES": server.address,
            "HOME": str(tmp_path),
        }
        done = subprocess.run(command, input=said, env={**os.environ, **environment}, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


@pytest.fixture
def ann(server: SimpleNamespace) -> Client:
    client: Client = server.client(server.ann)
    return client


def hosts(ann: Client) -> list[str]:
    return [secret["name"] for secret in ann.list_secrets("git")["data"]]


def test_what_is_stored_is_got_and_erased(git: Callable[[str, str], str], ann: Client) -> None:
    assert git("get", SITE) == ""
    git("store", f"{SITE}username=ada\npassword=p=ss wörd\n\n")
    assert git("get", f"{SITE}\n") == f"{SITE}username=ada\npassword=p=ss wörd\n"
    assert hosts(ann) == ["git.lab"]
    for other in ("protocol=http\nhost=git.lab\n", "protocol=https\nhost=git.lab:8443\n", f"{SITE}username=bob\n"):
        assert git("get", other) == ""
    git("erase", f"{SITE}username=ada\npassword=another\n")  # Git tried one that is not kept any more
    assert "ada" in git("get", SITE)
    git("erase", f"{SITE}username=ada\npassword=p=ss wörd\n")
    assert git("get", SITE) == ""
    assert hosts(ann) == []


def test_two_users_of_a_host_and_a_new_password(git: Callable[[str, str], str]) -> None:
    for user, password in (("ada", "one"), ("bob", "two"), ("ada", "three")):
        git("store", f"{SITE}username={user}\npassword={password}\n")
    assert "password=two\n" in git("get", f"{SITE}username=bob\n")
    assert "password=three\n" in git("get", f"{SITE}username=ada\n")


def test_paths_count_where_git_says_them(git: Callable[[str, str], str]) -> None:
    """As with `credential.useHttpPath`."""
    git("store", f"{SITE}path=lab/one.git\nusername=ada\npassword=one\n")
    assert git("get", f"{SITE}path=lab/two.git\n") == ""
    assert "password=one\n" in git("get", f"{SITE}path=lab/one.git\n")


def test_what_has_expired_is_not_told(git: Callable[[str, str], str], ann: Client) -> None:
    later, before = int(time.time()) + 1000, int(time.time()) - 1
    git("store", f"{SITE}username=ada\npassword=old\npassword_expiry_utc={before}\n")
    assert hosts(ann) == []
    git("store", f"{SITE}username=ada\npassword=new\npassword_expiry_utc={later}\n")
    assert f"password_expiry_utc={later}\n" in git("get", SITE)


def test_hosts_with_odd_names(git: Callable[[str, str], str]) -> None:
    for host in ("[::1]:8443", "a" * 200 + ".lab", "-"):
        git("store", f"protocol=https\nhost={host}\nusername=ada\npassword={host}\n")
        assert f"password={host}\n" in git("get", f"protocol=https\nhost={host}\n")


def test_half_a_credential_is_not_kept(git: Callable[[str, str], str], ann: Client) -> None:
    git("store", f"{SITE}username=ada\n")
    git("store", "nonsense\n\n")
    assert hosts(ann) == []
    assert git("get", "") == ""
