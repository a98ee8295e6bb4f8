"""What a shell of the default image shows first: `images/command/bashrc`, before a home's own .bashrc."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pexpect
import pytest

BASHRC = Path(__file__).parents[2] / "images/command/bashrc"
SESSION = {
    "BEAKER_JOB_ID": "01HW8DZJFR6QEAFAABCTCR2BY2",
    "BEAKER_NODE_HOSTNAME": "gpu-1.lab",
    "BEAKER_ASSIGNED_GPU_COUNT": "2",
}
# As Debian and Ubuntu write it into a new home.
SKELETON = r"""PS1='${debian_chroot:+($debian_chroot)}\u@\h:\w\$ '
PS1="\[\e]0;${debian_chroot:+($debian_chroot)}\u@\h: \w\a\]$PS1"
"""


def shown(tmp_path: Path, own: str, environment: Mapping[str, str], *lines: str) -> str:
    (tmp_path / "bashrc").write_text(BASHRC.read_text() + own)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "dumb", **environment}
    shell = pexpect.spawn(
        "bash",
        ["--noprofile", "--rcfile", str(tmp_path / "bashrc"), "-i"],
        env=env,
        cwd=str(tmp_path),
        encoding="utf-8",
    )
    for line in (*lines, "exit"):
        shell.sendline(line)
    shell.expect(pexpect.EOF)
    return shell.before.replace("\r\n", "\n")


@pytest.mark.parametrize("own", ["", SKELETON])
def test_the_greeting_and_the_prompt(tmp_path: Path, own: str) -> None:
    first, second, *_ = (text := shown(tmp_path, own, SESSION)).split("\n")
    assert first == "Session 01HW8DZJFR6QEAFAABCTCR2BY2 on gpu-1.lab: 2 GPUs, no time limit."
    assert "beaker session attach" in second
    assert "beaker session stop" in second
    assert "[BEAKER] " in text
    assert " ~ " in text.partition("[BEAKER] ")[2]


def test_the_time_limit_is_told(tmp_path: Path) -> None:
    told = shown(tmp_path, "", {**SESSION, "BEAKER_ASSIGNED_GPU_COUNT": "1", "BEAKER_TIME_LIMIT": "5405"})
    assert "1 GPU, time limit 1:30:05." in told


def test_a_prompt_of_ones_own_stays(tmp_path: Path) -> None:
    told = shown(tmp_path, "PS1='mine> '\n", SESSION)
    assert "mine> " in told
    assert "[BEAKER]" not in told


def test_a_shell_in_a_shell_is_not_greeted_again(tmp_path: Path) -> None:
    told = shown(tmp_path, "", SESSION, f"bash --rcfile {tmp_path}/bashrc -i", "exit")
    assert told.count("no time limit") == 1


def test_outside_a_session_nothing_is_said(tmp_path: Path) -> None:
    told = shown(tmp_path, SKELETON, {})
    assert "Session" not in told
    assert "[BEAKER]" not in told
