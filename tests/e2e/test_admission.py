"""Who may have what, by whichever way they ask: the attacks as they were made, at the door and through the server."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from beaker_sessions import ids
from beaker_sessions.client import Client
from beaker_sessions.sandbox import subordinate
from tests.stack import BIN, Stack, User, wait_for

# Sends the frames given as JSON, each through a connection of its own and all at once; prints each first answer.
ASK = """
import json, os, socket, sys, threading
frames, answers, ready = json.load(sys.stdin), [], threading.Barrier(int(sys.argv[1]))
def ask(frame):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.connect(os.environ["BEAKER_SOCKET"])
        ready.wait()
        door.sendall(json.dumps(frame).encode())
        answers.append(json.loads(door.recv(1 << 17)))
threads = [threading.Thread(target=ask, args=[frame]) for frame in frames]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(json.dumps(answers))
"""


def ask(user: User, *frames: dict) -> list[dict]:
    """The first answers to these frames, asked at once; with the user's own token where none is given."""
    full = [{"v": 1, "token": user.token, **frame} for frame in frames]
    done = user.run(sys.executable, "-c", ASK, str(len(full)), input=json.dumps(full).encode())
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def create(**session: object) -> dict:
    session.setdefault("requests", {"gpuCount": 0})
    return {"op": "create", "key": ids.ulid(), "session": session, "detach": True}


def code(answer: dict) -> str:
    return str(answer.get("error", {}).get("error", ""))


def test_a_token_of_a_session_or_an_executor_does_nothing_at_the_door(stack: Stack, ada: User) -> None:
    done = ada.beaker("session", "create", "--gpus", "0", "--detach", "--", "sleep", "1000")
    id = done.stdout.decode().strip()
    wait_for("the server hears of it", lambda: stack.admin.get_job(id))
    with closing(Client(stack.endpoint, ada.token)) as client:
        of_session = client.create_token({"name": "s", "scope": "session", "session": id})["token"]
    of_executor = stack.admin.create_token({"name": "e", "scope": "executor", "account": ada.name})["token"]
    for token in (of_session, of_executor):
        for frame in (
            create(command=["true"]),
            {"op": "exec", "id": id, "command": ["true"], "stdin": False},
            {"op": "attach", "id": id, "stream": False},
            {"op": "logs", "id": id},
            {"op": "stop", "id": id},
        ):
            (answer,) = ask(ada, frame | {"token": token})
            assert code(answer) == "forbidden", (frame, answer)
    assert stack.live() == [id]


def test_two_hundred_creates_at_once_pass_no_limit(stack: Stack, ada: User, bob: User) -> None:
    hog = {"command": ["sleep", "1000"], "requests": {"gpuCount": 2}}
    answers = ask(ada, *(create(**hog) for _ in range(200)))
    refused = [answer["error"] for answer in answers if "error" in answer]
    assert {error["error"] for error in refused} == {"limit"}
    assert len(stack.live()) == len(answers) - len(refused) == 51  # one has the GPUs, and the limit of waiting is 50
    assert "50" in refused[0]["message"]
    assert "limits.waiting" in refused[0]["message"]
    (answer,) = ask(bob, create(command=["true"]))
    assert code(answer) == "", "others are not concerned"


def test_a_hundred_execs_whose_callers_leave_pass_no_limit(stack: Stack, ada: User, bob: User) -> None:
    """Each is held by a process of root's, which a session's limits do not count."""
    wait = {"command": ["sleep", "1000"], "requests": {"gpuCount": 0}}
    (created,), (bobs,) = ask(ada, create(**wait)), ask(bob, create(**wait))
    id, other = created["job"]["id"], bobs["job"]["id"]
    for one in (id, other):
        wait_for("its start", lambda one=one: stack.admin.get_job(one)["status"].get("started"))
    run = {"op": "exec", "id": id, "command": ["sleep", "1001"], "stdin": False}
    answers = ask(ada, *(run for _ in range(100)))
    assert [code(answer) for answer in answers].count("limit") == 36, answers
    assert [answer.get("event") for answer in answers].count("terminal") == 64
    stack.executor.kill()
    stack.start_executor()
    (answer,) = ask(ada, run)
    assert code(answer) == "limit", "those of before the executor's restart count"
    assert "limits.execs" in answer["error"]["message"]
    (answer,) = ask(bob, run | {"id": other})
    assert answer.get("event") == "terminal", "others are not concerned"
    assert ada.beaker("session", "stop", id).returncode == 0
    (created,) = ask(ada, create(**wait))
    id = created["job"]["id"]
    wait_for("its start", lambda: stack.admin.get_job(id)["status"].get("started"))
    (answer,) = ask(ada, run | {"id": id})
    assert answer.get("event") == "terminal", "what ended with its session makes room"


def test_what_the_server_hands_over_meets_the_same_limit_and_ends_saying_so(stack: Stack, ada: User) -> None:
    hog = {"command": ["sleep", "1000"], "requests": {"gpuCount": 2}}
    ask(ada, *(create(**hog) for _ in range(51)))
    with closing(Client(stack.endpoint, ada.token)) as client:
        id = client.create_job({"session": {**hog, "node": "node-1.lab"}})["id"]
        wait_for("its end", lambda: "finalized" in client.get_job(id)["status"])
        status = client.get_job(id)["status"]
    assert status["error"] == "limit"
    assert "limits.waiting" in status["message"]


def test_an_account_has_no_session_as_a_unix_user_who_is_mapped_to_another(stack: Stack, ada: User) -> None:
    """The Unix user ada has the account of another name; whose the account `ada` is asks by way of the server."""
    friend = stack.admin.create_account({"name": f"friend-{ids.ulid().lower()}"})
    stack.executor.kill()
    settings = stack.config.read_text()
    stack.config.write_text(settings + f"accounts: {{{ada.name}: {friend['name']}}}\n")
    try:
        stack.start_executor()
        assert code(ask(ada, create(command=["true"]))[0]) == "forbidden"
        with closing(Client(stack.endpoint, ada.token)) as client:
            job = {"command": ["sh", "-c", "touch stolen"], "node": "node-1.lab", "requests": {"gpuCount": 0}}
            id = client.create_job({"session": job})["id"]
            wait_for("its end", lambda: "finalized" in client.get_job(id)["status"])
            assert client.get_job(id)["status"].get("error") == "forbidden"
        assert not (ada.home / "stolen").exists()
    finally:
        stack.executor.kill()
        stack.config.write_text(settings)
        stack.start_executor()


@pytest.fixture
def root(stack: Stack, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What root's shell has: a token of the account root, as `make session` writes it."""
    known = {entry.pw_name for entry in pwd.getpwall()}
    (tmp_path / ".beaker").mkdir()
    (tmp_path / ".beaker/config.yml").write_text(f"agent_address: {stack.address}\nuser_token: {stack.admin.token}\n")
    (tmp_path / ".beaker/config.yml").chmod(0o600)
    yield {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "BEAKER_SOCKET": str(stack.socket)}
    stack.settle()
    if "beaker-root" not in known:
        shutil.rmtree("/var/lib/beaker-root", ignore_errors=True)
        subprocess.run(["userdel", "beaker-root"], capture_output=True)


def by_root(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([BIN / "beaker", *words], env=environment, capture_output=True, stdin=subprocess.DEVNULL)


SHOW = "id -u; id -G; echo $HOME; sed 1q /proc/self/uid_map; touch $HOME/by-the-image"


def test_a_session_of_root_is_nobody_of_the_machine(stack: Stack, root: dict[str, str]) -> None:
    done = by_root(root, "session", "create", "--gpus", "0", "--", "sh", "-c", SHOW)
    assert done.returncode == 0, done.stderr
    uid, groups, home, first = done.stdout.decode().splitlines()
    user = pwd.getpwnam("beaker-root")
    assert (int(uid), home) == (user.pw_uid, user.pw_dir)
    assert "0" not in groups.split()
    assert first.split()[:2] != ["0", "0"] or stack.driver == "docker"
    assert len([line for line in done.stderr.decode().splitlines() if "beaker-root" in line]) == 1
    assert Path(home, "by-the-image").stat().st_uid == user.pw_uid
    assert Path(home).stat().st_mode & 0o777 == 0o700
    assert not Path("/root/by-the-image").exists()
    wait_for("its end", lambda: not stack.live())
    (job,) = json.loads(by_root(root, "session", "list", "--finalized", "--format", "json").stdout)[:1]
    assert job["author"]["name"] == "root"


def test_under_sudo_a_session_is_that_of_who_called_it(stack: Stack, ada: User, root: dict[str, str]) -> None:
    done = by_root(root | {"SUDO_USER": ada.name}, "session", "create", "--gpus", "0", "--", "sh", "-c", SHOW)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines()[0] == str(ada.uid)
    assert (ada.home / "by-the-image").stat().st_uid == ada.uid
    (ada.home / "by-the-image").unlink()
    wait_for("its end", lambda: not stack.live())
    (job,) = ada.json("session", "list", "--finalized")[:1]
    assert job["author"]["name"] == ada.name
    for wrong in ("nobody-of-this-name", "root\n"):
        assert by_root(root | {"SUDO_USER": wrong}, "session", "create", "--gpus", "0", "--", "true").returncode != 0


def test_under_sudo_no_file_of_roots_is_read_for_a_token(ada: User, root: dict[str, str], tmp_path: Path) -> None:
    secret = tmp_path / "of-root"
    secret.write_text("user_token: the-secret\n")
    secret.chmod(0o600)
    config = ada.home / ".beaker/config.yml"
    config.rename(config.with_name("mine"))
    config.symlink_to(secret)
    try:
        done = by_root(root | {"SUDO_USER": ada.name}, "session", "list")
        assert done.returncode == 64
        assert b"Permission denied" in done.stderr
        assert by_root(root | {"SUDO_USER": ada.name}, "config", "set", "default_org", "lab").returncode != 0
        assert secret.read_text() == "user_token: the-secret\n"
    finally:
        config.with_name("mine").rename(config)


def test_only_root_is_believed_whose_session_it_is(stack: Stack, ada: User, bob: User) -> None:
    (answer,) = ask(bob, create(command=["sh", "-c", "touch mine"], name="whose") | {"user": ada.name})
    assert answer["job"]["author"]["name"] == bob.name
    wait_for("its end", lambda: not stack.live())
    assert (bob.home / "mine").stat().st_uid == bob.uid
    assert not (ada.home / "mine").exists()
    (bob.home / "mine").unlink()


def test_the_group_root_stays_outside(stack: Stack) -> None:
    eve = stack.user("eve", groups=("root", "games"))
    done = eve.beaker("session", "create", "--gpus", "0", "--", "sh", "-c", "id -G; cat /proc/self/gid_map")
    assert done.returncode == 0, done.stderr
    groups, *maps = done.stdout.decode().splitlines()
    assert "0" not in groups.split()
    assert all(line.split()[:2] != ["0", "0"] for line in maps) or stack.driver == "docker"


# A directory service that finds whom it is asked for and lists nobody, as LDAP and SSSD do: nss(5), with one user.
DIRECTORY = """
#include <errno.h>
#include <nss.h>
#include <pwd.h>
#include <string.h>
static enum nss_status fill(struct passwd *p, char *buffer, size_t size, int *error) {
    if (size < 256) { *error = ERANGE; return NSS_STATUS_TRYAGAIN; }
    strcpy(buffer, NAME); strcpy(buffer + 128, HOME); buffer[127] = 0;
    p->pw_name = buffer; p->pw_passwd = p->pw_gecos = buffer + 127; p->pw_dir = buffer + 128; p->pw_shell = "/bin/sh";
    p->pw_uid = p->pw_gid = ID;
    return NSS_STATUS_SUCCESS;
}
enum nss_status _nss_lab_getpwuid_r(uid_t uid, struct passwd *p, char *buffer, size_t size, int *error) {
    return uid == ID ? fill(p, buffer, size, error) : NSS_STATUS_NOTFOUND;
}
enum nss_status _nss_lab_getpwnam_r(const char *name, struct passwd *p, char *buffer, size_t size, int *error) {
    return strcmp(name, NAME) ? NSS_STATUS_NOTFOUND : fill(p, buffer, size, error);
}
"""
PERSON = 1_500_000_123
LISTED = "import pwd; print(pwd.getpwuid({id}).pw_name, {id} in [entry.pw_uid for entry in pwd.getpwall()])"


@pytest.fixture
def directory(stack: Stack, tmp_path: Path) -> Iterator[User]:
    """A person whom only a directory service knows, to the executor alone: it has an nsswitch.conf of its own."""
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler, to make a source of users that lists nobody")
    name, home = f"dora-{ids.ulid()[-6:].lower()}", stack.root / "home/dora"
    home.mkdir(mode=0o700, parents=True)
    os.chown(home, PERSON, PERSON)
    (tmp_path / "lab.c").write_text(DIRECTORY)
    library = stack.root / "nss/libnss_lab.so.2"
    library.parent.mkdir()
    macros = [f'-DNAME="{name}"', f'-DHOME="{home}"', f"-DID={PERSON}"]
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, *macros, tmp_path / "lab.c"], check=True)
    (stack.root / "nss/nsswitch.conf").write_text("passwd: files lab\ngroup: files\nshadow: files\nhosts: files dns\n")
    mount = f"mount --bind {stack.root}/nss/nsswitch.conf /etc/nsswitch.conf"
    before = stack.executor.command, stack.executor.env
    private = ("unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh")
    stack.executor.kill()
    stack.executor.command, stack.executor.env = (*private, *before[0]), {"LD_LIBRARY_PATH": str(library.parent)}
    try:
        stack.start_executor()
        shown = [*private, sys.executable, "-c", LISTED.format(id=PERSON)]
        done = subprocess.run(shown, env={**os.environ, **stack.executor.env}, capture_output=True, text=True)
        assert done.stdout.split() == [name, "False"], done.stderr
        token = stack.admin.create_account({"name": name})["token"]
        yield Known(stack, name, token, PERSON, home)
        stack.settle()
    finally:
        stack.executor.kill()
        stack.executor.command, stack.executor.env = before
        for ready in Path("/run/beaker/oci", stack.bridge, "networks").glob("*.ready"):
            ready.unlink()  # mounted in its namespace alone, which has gone
        stack.start_executor()


class Known(User):
    """A user who is not in this machine's account files."""

    def __init__(self, stack: Stack, name: str, token: str, id: int, home: Path) -> None:
        self.stack, self.name, self.token, self.uid, self.gid, self.home = stack, name, token, id, id, home
        self.login(token)

    def process(self) -> dict:
        return {"user": self.uid, "group": self.gid, "extra_groups": [], "env": self.env, "cwd": self.home}


def test_root_of_a_sandbox_is_nobody_whom_a_directory_service_knows(stack: Stack, ada: User, directory: User) -> None:
    """The person's uid lies in ada's subordinate ids, since nothing on this machine lists it. They have no session."""
    if stack.driver != "oci":
        pytest.skip("sessions of Docker Engine have no subordinate ids")
    (stack.root / "net").mkdir()
    secret = stack.root / "net/of-dora"
    secret.write_text("secret")
    os.chown(secret, PERSON, PERSON)
    secret.chmod(0o600)
    ranges = [f"--add-sub{kind}s={PERSON - 123}-{PERSON - 123 + 65535}" for kind in ("uid", "gid")]
    forget_ranges(ada)
    subprocess.run(["usermod", *ranges, ada.name], check=True)
    try:
        done = ada.beaker("session", "create", "--gpus", "0", "--detach", "--", "sleep", "1000")
        id = done.stdout.decode().strip()
        script = "exec setpriv --reuid 123 --regid 123 --clear-groups cat " + str(secret)
        read = ada.beaker("session", "exec", "--root", id, "--", "sh", "-c", script)
        assert read.stdout != b"secret"
        assert done.returncode == 73
        assert b"subordinateIds" in done.stderr
        theirs = directory.beaker("session", "create", "--gpus", "0", "--", "true")
        assert theirs.returncode == 77
        assert b"subordinate ids" in theirs.stderr
    finally:
        forget_ranges(ada)
        secret.unlink()
        secret.parent.rmdir()


def forget_ranges(user: User) -> None:
    """As `usermod` does, whose lock keeps others from writing the files meanwhile."""
    options = []
    for kind in ("uid", "gid"):
        for name, first, count in subordinate.ranges(Path(f"/etc/sub{kind}")):
            options += [f"--del-sub{kind}s={first}-{first + count - 1}"] if name == user.name else []
    if options:
        subprocess.run(["usermod", *options, user.name], check=True)
