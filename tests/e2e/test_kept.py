"""What outlives a session and what does not: every line of the guide's table, in two sessions one after the other."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests import images
from tests.stack import REPOSITORY, Stack, User

GUIDE = REPOSITORY / "docs/interactive.md"
CREATE = ("session", "create", "--gpus", "0", "--image", "git")
DEB = (
    "mkdir -p p/DEBIAN && printf 'Package: extra\\nVersion: 1\\nArchitecture: all\\nMaintainer: a <a@b.c>\\n"
    "Description: x\\n' > p/DEBIAN/control && dpkg-deb -b p extra.deb && {sudo} dpkg -i extra.deb"
)
CREDENTIAL = (
    "printf 'protocol=https\\nhost=example.com\\nusername=ada\\n{more}\\n' | git -c credential.helper={helper} "
)
ASK = "GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true "
# The guide's line -> how it comes to be, and what finds it. {net} is where the node has its /net.
LINES = {
    "files in `~`": ("mkdir ~/work && echo a > ~/work/file", "cat ~/work/file"),
    "files in `/net`": ("echo a > {net}/file", "cat {net}/file"),
    "name and email for Git, in `~/.gitconfig`": (
        "git config --global user.name Ada && git config --global user.email ada@example.com",
        "git config user.name && git config user.email",
    ),
    "the `store` helper's passwords, in `~/.git-credentials`": (
        CREDENTIAL.format(helper="store", more="password=stored") + "credential approve",
        ASK + CREDENTIAL.format(helper="store", more="") + "credential fill | grep stored",
    ),
    "shell history, virtual environments, all else that programs keep in `~`": (
        "HISTFILE=~/.bash_history bash -ic 'history -s marked; history -a' && python3 -m venv --without-pip ~/venv",
        "grep marked ~/.bash_history && ~/venv/bin/python -c 'import sys; assert sys.prefix != sys.base_prefix'",
    ),
    "secrets, and what the `beaker` helper remembers": (
        CREDENTIAL.format(helper="'!~/bin/beaker credential'", more="password=sealed") + "credential approve",
        ASK + CREDENTIAL.format(helper="'!~/bin/beaker credential'", more="") + "credential fill | grep sealed",
    ),
    "the `cache` helper's passwords": (
        CREDENTIAL.format(helper="cache", more="password=cached") + "credential approve",
        ASK + CREDENTIAL.format(helper="cache", more="") + "credential fill | grep cached",
    ),
    "installed packages": (DEB, "dpkg -s extra"),
    "files in `/tmp`, `/etc` and everywhere else": (
        "echo a > /tmp/file; echo a > /var/tmp/file; echo a > /dev/shm/file; {sudo} touch /etc/file /usr/local/file",
        "ls /tmp/file || ls /var/tmp/file || ls /dev/shm/file || ls /etc/file || ls /usr/local/file",
    ),
    "what `--secret-mount` and `--secret-env` brought": (
        'test -r /secrets/key && test "$TOKEN"',
        'test -r /secrets/key || test "$TOKEN"',
    ),
    "programs that run": ("setsid sleep 987654 & sleep 0.2; pgrep -f 'sleep 98765[4]'", "pgrep -f 'sleep 98765[4]'"),
}


def table() -> dict[str, str]:
    """The guide's table: what one leaves -> what becomes of it."""
    text = GUIDE.read_text()
    return dict(re.findall(r"^\| (.+?) \| ((?:kept|gone|ended).*?) \|$", text, re.MULTILINE))


def test_the_table_is_tested():
    assert set(table()) == set(LINES)


@pytest.fixture
def net(stack: Stack) -> Iterator[Path]:
    net = stack.root / "net"
    net.mkdir()
    net.chmod(0o1777)
    before = stack.config.read_text()
    stack.config.write_text(yaml.safe_dump(yaml.safe_load(before) | {"mountPaths": [str(net)]}))
    stack.executor.kill()
    stack.start_executor()
    yield net
    stack.settle()
    stack.config.write_text(before)
    stack.executor.kill()
    stack.start_executor()
    shutil.rmtree(net)


@pytest.mark.usefixtures("command")
def test_what_is_kept(stack: Stack, ada: User, net: Path):
    stack.image("git", images.debian("git", "openssh-client", "openssh-server"))
    ada.beaker("secret", "write", "KEY", input=b"value")
    # Where there is no root inside, what only root could leave behind cannot come to be.
    places = {"net": str(net), "sudo": "sudo" if stack.driver == "oci" else "true"}

    def scripts(which: int) -> str:
        lines = [
            pair[which].replace("{net}", places["net"]).replace("{sudo}", places["sudo"]) for pair in LINES.values()
        ]
        return "\n".join(f"( cd $(mktemp -d); {line} ) >/dev/null 2>&1; echo $?" for line in lines)

    flags = ("--secret-mount", "KEY=/secrets/key", "--secret-env", "TOKEN=KEY")
    first = ada.beaker(*CREATE, *flags, "--", "bash", "-c", scripts(0) + "\n" + scripts(1))
    made, found = first.stdout.split()[: len(LINES)], first.stdout.split()[len(LINES) :]
    made = dict(zip(LINES, made, strict=True))
    assert set(made.values()) == {b"0"}, (made, first.stderr)
    within = dict(zip(LINES, found, strict=True))
    if stack.driver == "docker":
        within.pop("installed packages")
    assert set(within.values()) == {b"0"}, within

    second = ada.beaker(*CREATE, "--", "bash", "-c", scripts(1))
    kept = {line for line, code in zip(LINES, second.stdout.split(), strict=True) if code == b"0"}
    assert kept == {line for line, fate in table().items() if fate.startswith("kept")}
    assert (
        subprocess.run(["pgrep", "-u", str(ada.uid), "-f", "sleep 98765[4]"]).returncode == 1
    )  # on the machine neither
    bare = ada.beaker(*CREATE, "--bare", "--", "bash", "-c", scripts(1))
    assert {line for line, code in zip(LINES, bare.stdout.split(), strict=True) if code == b"0"} == set()
    for name in ("work", "venv", ".cache"):
        shutil.rmtree(ada.home / name, ignore_errors=True)
    for name in (".gitconfig", ".git-credentials", ".bash_history"):
        (ada.home / name).unlink(missing_ok=True)
    ada.beaker("secret", "delete", "-w", "git", "example.com")
