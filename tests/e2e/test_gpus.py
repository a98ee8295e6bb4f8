"""GPUs are claimed whole, by one session at a time, and nothing else can be opened."""

from __future__ import annotations

import os
import time

import pexpect
import pytest

from tests.e2e.conftest import PROMPT, Tty
from tests.stack import Stack, User, wait_for

# Opens the two made-up devices: ENXIO (no driver behind it) where it may, EPERM or ENOENT where it may not.
LOOK = """
import errno, os
for n in (0, 1):
    try:
        os.open(f"/dev/example{n}", os.O_RDWR)
    except OSError as error:
        print(errno.errorcode[error.errno], end=" ")
print(os.environ.get("EXAMPLE_GPU"), os.environ["BEAKER_ASSIGNED_GPU_COUNT"])
"""


def look(user: User, gpus: int) -> list[str]:
    done = user.beaker("session", "create", "--gpus", str(gpus), "--", "python3", "-c", LOOK)
    assert done.returncode == 0, done.stderr
    return done.stdout.decode().split()


def test_only_claimed_devices_can_be_opened(ada: User):
    assert look(ada, 0) == ["ENOENT", "ENOENT", "None", "0"]
    assert look(ada, 1) == ["ENXIO", "ENOENT", "0", "1"]
    assert look(ada, 2)[:2] == ["ENXIO", "ENXIO"]


def test_an_unclaimed_device_is_closed_even_by_its_number(ada: User, stack: Stack):
    """Its node, seen through a directory of the user's own, is refused by the device cgroup."""
    os.link(stack.devices[1], ada.home / "smuggled")
    code = "import os\ntry: os.open('smuggled', os.O_RDWR)\nexcept OSError as error: print(error.errno)"
    try:
        done = ada.beaker("session", "create", "--gpus", "1", "--", "python3", "-c", code)
    finally:
        (ada.home / "smuggled").unlink()
    assert done.stdout in (b"1\n", b"13\n")  # EPERM by the cgroup, EACCES by nodev


def test_two_share_nothing_and_the_third_waits_its_turn(ada: User, bob: User, tty: type[Tty]):
    first, second = tty(ada, "session", "create", "--name", "first"), tty(bob, "session", "create", "--name", "second")
    for terminal in (first, second):
        terminal.expect("with at least 1 GPU")
        terminal.expect("Reserved 1 GPU")
        terminal.expect(PROMPT)
    held = {user: [gpu for job in user.json("session", "list") for gpu in job["limits"]["gpus"]] for user in (ada, bob)}
    assert sorted(held[ada] + held[bob]) == ["example.com/gpu=0", "example.com/gpu=1"]

    third = tty(bob, "session", "create", "--name", "third")
    third.expect("needs 1 GPU, 0 free")
    assert third.expect([PROMPT, pexpect.TIMEOUT], timeout=1) == 1
    first.sendline("exit")
    first.end()
    third.expect("Reserved 1 GPU")
    third.expect(PROMPT)
    (job,) = [job for job in bob.json("session", "list") if job["name"] == "third"]
    assert job["limits"]["gpus"] == held[ada]


def test_ctrl_c_gives_the_place_up(ada: User, bob: User, tty: type[Tty]):
    ada.beaker("session", "create", "--gpus", "2", "--detach", "--", "sleep", "1000")
    waiting = tty(bob, "session", "create")
    waiting.expect("0 free")
    waiting.sendintr()
    waiting.expect("(?i)(gave|given|giving) up")
    assert waiting.end() == 130
    assert bob.json("session", "list") == []


def test_a_small_request_passes_only_where_it_delays_nobody(ada: User, bob: User):
    ada.beaker("session", "create", "--gpus", "1", "--detach", "--", "sleep", "1000")
    big = bob.beaker("session", "create", "--gpus", "2", "--detach", "--", "true").stdout.decode().strip()
    small = bob.beaker("session", "create", "--gpus", "1", "--detach", "--", "true").stdout.decode().strip()
    assert look(ada, 0)[-1] == "0"  # needs none of what the big one waits for
    jobs = {job["id"]: job for job in bob.json("session", "list")}
    assert jobs[big]["queuePosition"] == 1
    assert jobs[small]["queuePosition"] == 2
    assert "ahead" in jobs[small]["reason"]
    ada.beaker("session", "stop")
    wait_for("the queue to empty", lambda: bob.json("session", "list") == [])
    final = {job["id"]: job["status"] for job in bob.json("session", "list", "--finalized")}
    assert final[big]["scheduled"] < final[small]["scheduled"]


@pytest.mark.parametrize("gpus", [0, 1])
def test_release_and_claim_again_many_times(ada: User, gpus: int):
    for _ in range(5):
        assert look(ada, gpus)[-1] == str(gpus)


def test_a_burst_never_shares(stack: Stack, ada: User, bob: User):
    """Twelve sessions on two GPUs: each sees exactly one, never two at a time on the same."""
    ids = [
        user.beaker("session", "create", "--detach", "--", "sh", "-c", "sleep 0.2").stdout.decode().strip()
        for user in (ada, bob) * 6
    ]
    deadline = time.monotonic() + 60
    while stack.live() and time.monotonic() < deadline:
        held = [gpu for job in ada.json("session", "list", "--all") for gpu in job.get("limits", {}).get("gpus", [])]
        assert len(held) == len(set(held)) <= 2
    final = {job["id"]: job for user in (ada, bob) for job in user.json("session", "list", "--finalized")}
    assert [final[id]["status"]["exitCode"] for id in ids] == [0] * 12
    started = [final[id]["status"]["scheduled"] for id in ids]
    assert started == sorted(started)
