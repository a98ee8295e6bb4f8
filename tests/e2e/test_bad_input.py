"""Each mistake gets one clear line and its exit code, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
from contextlib import closing

import pexpect
import pytest

from beaker_sessions.client import Client
from tests.e2e.conftest import Tty
from tests.stack import BIN, Stack, User, wait_for

CREATE = ("session", "create", "--gpus", "0")


def refused(user: User, *words: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """The exit code and the one line that a mistake gets."""
    done = user.beaker(*words, env=env)
    lines = [line for line in done.stderr.decode().splitlines() if not line.startswith("Starting session")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("beaker: ")
    return done.returncode, lines[0]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--gpus", "-1"), 64, "-1"),
        (("--gpus", "two"), 64, "'two'"),
        (("--gpus", "99"), 64, "this node has 2"),
        (("--gpus", "0", "--cpus", "4000"), 64, "4000"),
        (("--gpus", "0", "--cpus", "nan"), 64, "nan"),
        (("--gpus", "0", "--memory", "5parsecs"), 64, "'5parsecs'"),
        (("--gpus", "0", "--memory", "900TiB"), 64, "this node has"),
        (("--gpus", "0", "--colour", "red"), 64, "--colour"),
        (("--gpus", "0", "--image", "no-such-image:none", "--pull", "never"), 66, "no-such-image:none"),
        (("--gpus", "0", "--image", "UPPER CASE"), 64, "UPPER CASE"),
        (("--gpus", "0", "--image", "../../etc"), 64, "../../etc"),
        (("--gpus", "0", "--node", "elsewhere.lab"), 64, "elsewhere.lab"),
        (("--gpus", "0", "--name", "a\x1b[31mb"), 64, "name"),
        (("--gpus", "0", "--name", "a b"), 64, "a b"),
        (("--gpus", "0", "--workdir", "not/absolute"), 64, "not/absolute"),
        (("--gpus", "0", "--env", "1X=2"), 64, "1X"),
        (("--gpus", "0", "--timeout", "soon"), 64, "soon"),
        (("--gpus", "0", "--host-networking"), 77, "not allowed"),
    ],
)
def test_a_wrong_value_is_named(stack: Stack, ada: User, words: tuple[str, ...], code: int, says: str):
    got, line = refused(ada, "session", "create", *words, "--", "true")
    assert (got, says in line) == (code, True), line
    assert "\x1b" not in line
    wait_for("nothing to be left", lambda: not stack.live() and not stack.sandboxes())


@pytest.mark.parametrize("command", ["attach", "stop", "describe", "get", "logs", "exec"])
def test_an_unknown_session(ada: User, command: str):
    code, line = refused(ada, "session", command, "01HW8DZJFR6QEAFAABCTCR2BY2")
    assert code == 66
    assert "01HW8DZJFR6QEAFAABCTCR2BY2" in line


def test_an_unknown_node(ada: User):
    code, line = refused(ada, "node", "get", "nowhere")
    assert (code, "nowhere" in line) == (66, True)


def test_an_unknown_command(ada: User):
    code, line = refused(ada, "sesion", "create")
    assert (code, "session" in line) == (64, True)


@pytest.mark.parametrize("token", ["", "nonsense", "bkr_" + "0" * 50])
def test_a_wrong_token(ada: User, token: str):
    code, _ = refused(
        ada, *CREATE, "--", "true", env={"BEAKER_TOKEN": token} if token else {"BEAKER_CONFIG": "/dev/null"}
    )
    assert code == 77


def test_another_accounts_token(ada: User, bob: User):
    code, line = refused(ada, *CREATE, "--", "true", env={"BEAKER_TOKEN": bob.token})
    assert (code, bob.name in line, ada.name in line) == (77, True, True)


def test_an_expired_token(stack: Stack, ada: User):
    with closing(Client(stack.endpoint, ada.token)) as client:
        made = client.create_token({"name": "brief", "expiry": "1s"})["token"]
    wait_for("its expiry", lambda: ada.beaker("account", "whoami", env={"BEAKER_TOKEN": made}).returncode == 77)
    code, _ = refused(ada, *CREATE, "--", "true", env={"BEAKER_TOKEN": made})
    assert code == 77


def test_no_executor(ada: User):
    code, line = refused(ada, *CREATE, "--", "true", env={"BEAKER_SOCKET": "/nowhere/executor.sock"})
    assert code == 69
    assert "/nowhere/executor.sock" in line


def test_no_server(ada: User):
    code, line = refused(ada, "cluster", "list", env={"BEAKER_ADDR": "http://127.0.0.1:9"})
    assert (code, "127.0.0.1:9" in line) == (69, True)


def test_no_home(stack: Stack):
    carl = stack.user("carl")
    config = (carl.home / ".beaker" / "config.yml").read_bytes()
    elsewhere = stack.root / "carl.yml"
    elsewhere.write_bytes(config)
    os.chown(elsewhere, carl.uid, carl.gid)
    elsewhere.chmod(0o600)
    moved = carl.home.with_name("moved")
    carl.home.rename(moved)
    process = {**carl.process(), "cwd": "/", "env": {**carl.env, "BEAKER_CONFIG": str(elsewhere)}}
    done = subprocess.run([BIN / "beaker", *CREATE, "--", "true"], capture_output=True, **process)
    assert done.returncode == 66
    assert str(carl.home).encode() in done.stderr
    bare = subprocess.run([BIN / "beaker", *CREATE, "--bare", "--", "pwd"], capture_output=True, **process)
    assert (bare.returncode, bare.stdout) == (0, b"/\n"), bare.stderr
    moved.rename(carl.home)


def test_not_logged_in_asks_without_echo_and_saves(ada: User, tty: type[Tty]):
    config = ada.home / ".beaker" / "config.yml"
    ada.beaker("config", "unset", "user_token")
    terminal = tty(ada, *CREATE, "--", "echo", "went-in")
    terminal.expect("/user")
    terminal.expect("(?i)token:")
    terminal.sendline("wrong")
    terminal.expect("(?i)token:")
    terminal.sendline(ada.token)
    terminal.expect("went-in")
    assert terminal.end() == 0
    assert ada.token in config.read_text()
    assert config.stat().st_mode & 0o777 == 0o600
    assert config.stat().st_uid == ada.uid


def test_the_token_is_not_echoed(ada: User, tty: type[Tty]):
    ada.beaker("config", "unset", "user_token")
    terminal = tty(ada, *CREATE, "--", "true")
    terminal.expect("(?i)token:")
    terminal.sendline(ada.token)
    terminal.expect(pexpect.EOF)
    assert ada.token not in terminal.before


def test_what_is_wrong_with_a_machine_is_for_administrators(stack: Stack, ada: User):
    done = ada.beaker("executor", "doctor")
    assert (done.returncode, done.stdout) == (77, b"")
    assert b"administrators" in done.stderr
    assert b"sudo beaker executor doctor" in done.stderr
    environment = {**os.environ, "BEAKER_SOCKET": str(stack.socket)}
    root = subprocess.run([BIN / "beaker", "executor", "doctor"], env=environment, capture_output=True)
    assert b"can change what root runs here" in root.stdout
