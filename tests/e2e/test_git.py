"""Git in a session, as the guide has it: a real server over HTTP and one over SSH, with every credential helper."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import images
from tests.e2e.conftest import Tty
from tests.stack import REPOSITORY, Stack, User, wait_for

PASSWORD = "ghp-0123456789abcdef"
ADDRESS = "http://127.0.0.1:8099/work.git"
# What each session begins with: the server, which is gone with it, and Git's own way to ask, on the terminal.
SERVE = "(python3 ~/gitserver.py 8099 ~/repositories ada {password} &)"
LISTENS = "until (: </dev/tcp/127.0.0.1/{port}) 2>/dev/null; do sleep 0.05; done"


@pytest.fixture(scope="module")
def image(stack: Stack) -> str:
    stack.image("git", images.git())
    return "git"


@pytest.fixture
def home(ada: User, command: Path) -> Iterator[Path]:
    """A home with a repository to serve, and the command line; what Git keeps in it is gone afterwards."""
    home = command.parents[1]
    shutil.copyfile(REPOSITORY / "tests/gitserver.py", home / "gitserver.py")
    repository = home / "repositories/work.git"
    subprocess.run(["git", "init", "-q", "--bare", "-b", "main", repository], check=True)
    with (repository / "config").open("a") as file:
        file.write("[http]\n\treceivepack = true\n")
    subprocess.run(["chown", "-R", f"{ada.uid}:{ada.gid}", home / "repositories"], check=True)
    yield home
    for name in ("repositories", "work", "again", ".ssh", ".cache"):
        shutil.rmtree(home / name, ignore_errors=True)
    for name in (".gitconfig", ".git-credentials", "gitserver.py"):
        (home / name).unlink(missing_ok=True)


class Session:
    """A terminal in a session with the Git server beside it; `run` answers Git's questions and says how often."""

    def __init__(
        self, tty: type[Tty], user: User, image: str, password: str = PASSWORD, env: Mapping[str, str] | None = None
    ) -> None:
        path = "PATH=/usr/local/bin:/usr/bin:/bin:" + str(user.home / "bin")
        self.terminal = tty(user, "session", "create", "--gpus", "0", "--image", image, "--env", path, env=env)
        self.run("unset HISTFILE")  # the next line has the password in it
        self.run(SERVE.format(password=password))
        self.run(LISTENS.format(port=8099))

    def run(self, line: str, answers: tuple[str, str] = ("ada", PASSWORD)) -> int:
        """Runs a line that has to succeed: how often Git asked for a password."""
        asked = 0
        self.terminal.sendline(f"{line}; echo status=$?=")
        while True:
            found = self.terminal.expect([r"status=(\d+)=", r"Username for [^\r\n]*: ", r"Password for [^\r\n]*: "])
            if found == 0:
                assert self.terminal.match[1] == "0", self.terminal.before
                return asked
            asked += found == 2
            self.terminal.sendline(answers[found - 1])

    def fails(self, line: str) -> None:
        self.run(f"! {line}")

    def leave(self) -> None:
        self.terminal.sendline("exit")
        self.terminal.end()


@pytest.mark.usefixtures("home")
def test_clone_commit_push_and_asked_every_time(ada: User, image: str, tty: type[Tty]):
    first = Session(tty, ada, image)
    first.run("git config --global user.name 'Ada Lovelace' && git config --global user.email ada@example.com")
    assert first.run(f"git clone -q {ADDRESS}") == 1
    first.run("cd work && git checkout -q -B main && echo one >file && git add file && git commit -qm one")
    assert first.run("git push -q origin main") == 1
    assert first.run("git pull -q origin main") == 1
    first.leave()
    second = Session(tty, ada, image)
    assert second.run(f"git clone -q {ADDRESS} again") == 1
    second.run('test "$(cat again/file)" = one && test "$(git -C again log -1 --format=%an)" = \'Ada Lovelace\'')
    second.run('test "$(git config user.email)" = ada@example.com')
    second.leave()


@pytest.mark.usefixtures("home")
def test_the_cache_remembers_within_a_session(ada: User, image: str, tty: type[Tty]):
    first = Session(tty, ada, image)
    first.run("git config --global credential.helper 'cache --timeout 3600'")
    assert first.run(f"git ls-remote {ADDRESS}") == 1
    assert first.run(f"git ls-remote {ADDRESS}") == 0
    first.leave()
    second = Session(tty, ada, image)
    assert second.run(f"git ls-remote {ADDRESS}") == 1
    second.leave()


def test_the_store_remembers_across_sessions(ada: User, home: Path, image: str, tty: type[Tty]):
    first = Session(tty, ada, image)
    first.run("git config --global credential.helper store")
    assert first.run(f"git ls-remote {ADDRESS}") == 1
    first.leave()
    second = Session(tty, ada, image)
    assert second.run(f"git ls-remote {ADDRESS}") == 0
    assert PASSWORD in (home / ".git-credentials").read_text()
    second.run("rm ~/.git-credentials")
    assert second.run(f"git ls-remote {ADDRESS}") == 1
    second.leave()


def test_the_beaker_helper_keeps_nothing_in_the_home(ada: User, home: Path, image: str, tty: type[Tty]):
    """Remembered across sessions, in no file, forgotten everywhere at once, and corrected when refused."""
    first = Session(tty, ada, image)
    first.run("git config --global credential.helper beaker")
    assert first.run(f"git ls-remote {ADDRESS}") == 1
    assert first.run(f"git ls-remote {ADDRESS}") == 0
    first.leave()
    kept = subprocess.run(["grep", "-rlF", PASSWORD, home], capture_output=True, text=True).stdout
    assert kept == ""
    second = Session(tty, ada, image)
    assert second.run(f"git ls-remote {ADDRESS}") == 0
    second.leave()

    third = Session(tty, ada, image, password="another-password")  # revoked at the host
    third.fails(f"git ls-remote {ADDRESS} </dev/null")
    assert third.run(f"git ls-remote {ADDRESS}", ("ada", "another-password")) == 1
    assert third.run(f"git ls-remote {ADDRESS}") == 0
    third.leave()

    assert ada.beaker("secret", "list", "-w", "git", "--quiet").stdout == b"127.0.0.1_8099\n"
    assert ada.beaker("secret", "delete", "-w", "git", "127.0.0.1_8099").returncode == 0
    fourth = Session(tty, ada, image)
    assert fourth.run(f"git ls-remote {ADDRESS}") == 1
    fourth.leave()
    ada.beaker("secret", "delete", "-w", "git", "127.0.0.1_8099")


def keys(ada: User, *names: str) -> None:
    """Keys in ~/.ssh, of which the first opens an account of ada's, served by `sshd -f ~/.ssh/sshd`."""
    folder = ada.home / ".ssh"
    for command in (
        ["mkdir", "-m", "700", str(folder)],
        *(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", n, "-f", str(folder / n)] for n in (*names, "host")),
        ["cp", str(folder / f"{names[0]}.pub"), str(folder / "authorized_keys")],
    ):
        assert ada.run(*command).returncode == 0
    (folder / "sshd").write_text(
        f"Port 2299\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nUsePAM no\n"
        f"PasswordAuthentication no\nAuthorizedKeysFile {folder}/authorized_keys\n"
    )
    os.chown(folder / "sshd", ada.uid, ada.gid)


SSHD = "/usr/sbin/sshd -f ~/.ssh/sshd && " + LISTENS.format(port=2299)
SSH = "export GIT_SSH_COMMAND='ssh -o StrictHostKeyChecking=no -o BatchMode=yes -p 2299'"


def test_a_key_in_the_home(ada: User, home: Path, image: str, tty: type[Tty]):
    """Owner and mode of ~/.ssh are as ssh wants them, and a clone over SSH needs no more."""
    keys(ada, "id_ed25519")
    session = Session(tty, ada, image)
    session.run(SSHD)
    session.run(SSH)
    session.run("git clone -q 127.0.0.1:repositories/work.git again && test -d again/.git")
    (home / ".ssh/id_ed25519").unlink()
    session.fails("git ls-remote 127.0.0.1:repositories/work.git")
    session.leave()


@pytest.fixture
def agents(ada: User, home: Path) -> Iterator[tuple[Path, Path]]:
    """The sockets of two agents of ada's, as of two logins: each has a key of its own, and no file has."""
    keys(ada, "first", "second")
    running, sockets = [], []
    for name in ("first", "second"):
        sockets.append(home / f".ssh/agent-{name}")
        running.append(subprocess.Popen(["ssh-agent", "-D", "-a", sockets[-1]], stdout=subprocess.DEVNULL,
                                        **{**ada.process(), "env": ada.env}))  # fmt: skip
        wait_for("the agent", sockets[-1].is_socket)
        agent = {"SSH_AUTH_SOCK": str(sockets[-1])}
        assert ada.run("ssh-add", str(home / f".ssh/{name}"), env=agent).returncode == 0
        (home / f".ssh/{name}").unlink()
    yield sockets[0], sockets[1]
    for process in running:
        process.terminate()
        process.wait()


def test_a_forwarded_agent(ada: User, agents: tuple[Path, Path], image: str, tty: type[Tty]):
    """The agent of the login is there, that of a newer login takes its place, and what that forgets is gone."""
    first = Session(tty, ada, image, env={"SSH_AUTH_SOCK": str(agents[0])})
    first.run("ssh-add -l | grep first")
    first.run(SSHD)
    first.run(SSH)
    first.run("git clone -q 127.0.0.1:repositories/work.git again && test -d again/.git")
    first.terminal.send("\x1ed")
    assert first.terminal.end() == 0

    second = tty(ada, "session", "attach", env={"SSH_AUTH_SOCK": str(agents[1])})
    first.terminal = second
    first.run("ssh-add -l | grep second")
    first.fails("git ls-remote 127.0.0.1:repositories/work.git")  # whose key opens nothing
    assert ada.run("ssh-add", "-D", env={"SSH_AUTH_SOCK": str(agents[1])}).returncode == 0
    first.run("ssh-add -l | grep 'no identities'")
    first.leave()


def test_without_an_agent_there_are_no_keys(ada: User, image: str):
    done = ada.beaker("session", "create", "--gpus", "0", "--image", image, "--", "ssh-add", "-l")
    assert (done.returncode, done.stdout) == (1, b"The agent has no identities.\n")
