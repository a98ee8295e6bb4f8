"""Root inside, oneself outside. The docker driver refuses, since its root would be the machine's."""

from __future__ import annotations

import os

import pytest

from tests.stack import Stack, User


def session(user: User) -> str:
    done = user.beaker("session", "create", "--gpus", "0", "--detach", "--", "sleep", "1000")
    return done.stdout.decode().strip()


def test_exec_as_root(stack: Stack, ada: User):
    id = session(ada)
    script = "id -u; touch /etc/marked home-file; chown daemon:daemon /etc/marked; stat -c %U /etc/marked; whoami"
    done = ada.beaker("session", "exec", "--root", id, "--", "sh", "-c", script)
    if stack.driver == "docker":
        assert (done.returncode, done.stdout) == (77, b"")
        assert b"gives no root" in done.stderr
        return
    assert done.stdout.decode().split() == ["0", "daemon", "root"], done.stderr
    made = (ada.home / "home-file").stat()
    assert made.st_uid not in (0, ada.uid)  # an id of ada's own subordinate range
    assert ada.beaker("session", "exec", id, "--", "id", "-un").stdout.decode().strip() == ada.name
    (ada.home / "home-file").unlink()


def test_sudo_makes_root_of_the_sandbox_alone(stack: Stack, ada: User, bob: User):
    id = session(ada)
    done = ada.beaker("session", "exec", id, "--", "sudo", "-n", "id", "-u")
    if stack.driver == "docker":
        assert done.returncode != 0
        return
    assert done.stdout == b"0\n", done.stderr
    secret = bob.home / "shut"
    secret.write_text("bob's")
    os.chown(secret, bob.uid, bob.gid)
    secret.chmod(0o600)
    done = ada.beaker("session", "exec", id, "--", "sudo", "-n", "cat", str(secret))
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_low_port_can_be_bound(stack: Stack, ada: User):
    if stack.driver == "docker":
        pytest.skip("no root in this driver")
    code = "import socket; socket.create_server(('', 80)); print('bound')"
    done = ada.beaker("session", "create", "--gpus", "0", "--", "python3", "-c", code)
    assert done.stdout == b"bound\n", done.stderr
