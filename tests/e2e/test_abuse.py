"""What a session's processes and other users of the machine try, and do not get."""

from __future__ import annotations

import itertools
import json
import threading

from tests.stack import BIN, Stack, User

# Speaks to the executor's door from inside, through a link to it in the home.
KNOCK = """
import json, socket, sys
door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
door.connect(sys.argv[1])
door.sendall(json.dumps({"v": 1, "op": "list", "token": sys.argv[2]}).encode())
print(door.recv(1 << 17).decode())
"""


def test_the_door_is_shut_to_processes_inside(stack: Stack, ada: User):
    """The socket is in the home, and so in the session, by a hard link; the token is the user's own and right."""
    door = ada.home / "door.sock"
    door.hardlink_to(stack.socket)
    try:
        outside = ada.run("/usr/bin/python3", "-c", KNOCK, str(door), ada.token)
        assert json.loads(outside.stdout) == {"end": True}, outside.stderr
        done = ada.beaker("session", "create", "--gpus", "0", "--", "python3", "-c", KNOCK, str(door), ada.token)
    finally:
        door.unlink()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["error"]["error"] == "forbidden"


def test_other_peoples_homes_stay_shut(ada: User, bob: User):
    secret = bob.home / "secret"
    secret.write_text("bob's")
    secret.chmod(0o600)
    done = ada.beaker("session", "create", "--gpus", "0", "--", "cat", str(secret))
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_home_that_is_a_link_leads_only_where_its_owner_may_go(stack: Stack, bob: User):
    """Bob's home becomes a link to a directory of root's that nobody else may enter."""
    hidden, kept = stack.root / "hidden", bob.home.with_name("kept")
    hidden.mkdir(mode=0o700)
    config = (bob.home / ".beaker" / "config.yml").read_text()
    bob.home.rename(kept)
    bob.home.symlink_to(hidden)
    try:
        token = config.split("user_token: ")[1].strip()
        env = {"BEAKER_ADDR": stack.address, "BEAKER_TOKEN": token, "BEAKER_CONFIG": "/dev/null"}
        done = bob.beaker("session", "create", "--gpus", "0", "--", "ls", "-a", env=env, cwd="/")
    finally:
        bob.home.unlink()
        kept.rename(bob.home)
    assert done.returncode == 77, done.stderr
    assert str(bob.home).encode() in done.stderr


def test_a_session_sees_no_processes_of_the_machine(ada: User):
    script = "import os; print(sorted(int(p) for p in os.listdir('/proc') if p.isdigit())[-1] < 1000)"
    done = ada.beaker("session", "create", "--gpus", "0", "--", "python3", "-c", script)
    assert done.stdout == b"True\n"


def test_a_home_swapped_during_the_start_is_ones_own_or_nothing(ada: User, bob: User):
    """Bob's home is a link that goes back and forth between his own directory and ada's, while he starts sessions."""
    (ada.home / "private").write_text("ada's")
    mode = ada.home.stat().st_mode & 0o7777
    ada.home.chmod(0o700)
    own, stopped = bob.home.with_name("bob-own"), threading.Event()
    bob.home.rename(own)
    bob.home.symlink_to(own)

    def swap() -> None:
        spare = bob.home.with_name("bob-spare")
        for target in itertools.cycle((ada.home, own)):
            spare.symlink_to(target)
            spare.replace(bob.home)
            if stopped.wait(0.0005):
                return

    swapper = threading.Thread(target=swap)
    swapper.start()
    try:
        for _ in range(8):
            done = bob.run(
                str(BIN / "beaker"), "session", "create", "--gpus", "0", "--", "sh", "-c", "cat private; touch mine",
                env={"BEAKER_TOKEN": bob.token}, cwd="/",
            )  # fmt: skip
            assert b"ada's" not in done.stdout
    finally:
        stopped.set()
        swapper.join()
        bob.home.unlink()
        own.rename(bob.home)
        (ada.home / "private").unlink()
        ada.home.chmod(mode)
    assert not (ada.home / "mine").exists()
