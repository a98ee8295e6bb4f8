"""An upgrade of executor, server and command line while sessions of the version before run.

The version before is a commit of this repository: a clone without its history skips.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from beaker_sessions.client import Client
from beaker_sessions.transport import Endpoint
from tests.e2e.conftest import Tty
from tests.stack import BIN, REPOSITORY, Stack, User, wait_for

BEFORE = "f90211c0"  # the last one in which sessions were made in the machine's own mount namespace
WAIT = "until [ -e end ]; do sleep 0.1; done; exit 7"
MODULES = {"beaker": "cli.main", "beaker-server": "server.main", "beaker-executor": "executor.main"}


@pytest.fixture(scope="module")
def before() -> Iterator[Path]:
    """A directory with the programs of the version before, run by this environment's interpreter."""
    archive = subprocess.run(
        ["git", "-c", f"safe.directory={REPOSITORY}", "-C", str(REPOSITORY), "archive", BEFORE, "beaker_sessions"],
        capture_output=True, check=False,
    )  # fmt: skip
    if archive.returncode != 0:
        pytest.skip(f"needs the commit {BEFORE}, which this clone does not have")
    with tempfile.TemporaryDirectory(prefix="before-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
        for name, module in MODULES.items():
            program = path / name
            program.write_text(
                f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {directory!r})\n"
                f"from beaker_sessions.{module} import main\nsys.exit(main())\n"
            )
            program.chmod(0o755)
        yield path


@pytest.fixture(scope="module", params=["docker", "oci"])
def stack(request: pytest.FixtureRequest, before: Path, debian: Path) -> Iterator[Stack]:
    """A node whose server and executor are still those of the version before."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it starts Docker Engine and an executor")
    root = Path(tempfile.mkdtemp(prefix="beaker-"))
    root.chmod(0o755)
    stack = Stack(root, gpus=2, driver=request.param, settings={"defaultImage": "debian"}, programs=before)
    settings = yaml.safe_load(stack.config.read_text())
    del settings["server"]["sockets"]  # which is not known before
    stack.config.write_text(yaml.safe_dump(settings))
    stack.endpoint = Endpoint(stack.address, str(root), [stack.address])
    try:
        stack.start()
        stack.image("debian", debian)
        yield stack
    finally:
        stack.close()


@pytest.fixture(scope="module")
def ada(stack: Stack) -> User:
    return stack.user("ada", groups=("video",))


def test_sessions_live_through_an_upgrade(stack: Stack, ada: User, before: Path, tty: type[Tty]) -> None:
    def old(*words: str) -> str:
        done = ada.run(str(before / "beaker"), "session", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.decode().strip()

    web = old("create", "--gpus", "1", "--detach", "--port", "8000", "--", "python3", "-m", "http.server", "8000")
    shell = old("create", "--gpus", "1", "--detach", "--name", "shell", "--", "bash", "-c", WAIT)
    wait_for("two sandboxes", lambda: len([pid for pid in stack.sandboxes().values() if pid]) == 2)
    waiting = old("create", "--gpus", "1", "--detach", "--name", "waiting", "--", "true")
    pids = stack.sandboxes()
    port = ada.json("session", "get", web)[0]["portMappings"]["8000"]

    for process in (stack.server, stack.executor):
        process.kill()
        process.command = (str(BIN / Path(process.command[0]).name), *process.command[1:])
    settings = yaml.safe_load(stack.config.read_text())
    settings["server"]["sockets"] = str(stack.root)
    stack.config.write_text(yaml.safe_dump(settings))
    stack.server.start()
    stack.admin.close()
    stack.admin = Client(Endpoint(stack.address, str(stack.root)), stack.admin.token)
    wait_for("the server", lambda: stack.admin.whoami())
    stack.start_executor()

    assert stack.sandboxes() == pids, "the same processes"
    jobs = {job["id"]: job for job in ada.json("session", "list")}
    assert set(jobs) == {web, shell, waiting}
    assert jobs[waiting]["queuePosition"] == 1
    for id in (web, shell):
        done = ada.beaker("session", "exec", id, "--", "id", "-un")
        assert (done.returncode, done.stdout.decode().strip()) == (0, ada.name), done.stderr
    done = ada.beaker("session", "exec", web, "--", "test", "-S", "/run/beaker/session.sock")
    assert done.returncode == 0
    network = ["nsenter", "--net", "--target", str(stack.docker.pid)] if stack.driver == "docker" else []
    address = "172.17.0.1" if stack.driver == "docker" else "127.0.0.1"
    fetch = f"import urllib.request as u; u.urlopen('http://{address}:{port}/', timeout=5).read()"
    wait_for(
        "the published port",
        lambda: subprocess.run([*network, "python3", "-c", fetch], capture_output=True, check=False).returncode == 0,
    )

    terminal = tty(ada, "session", "attach", "shell")
    assert ada.run("touch", str(ada.home / "end")).returncode == 0
    assert terminal.end() == 7
    wait_for("the one that waited", lambda: ada.json("session", "get", waiting)[0]["status"].get("exitCode") == 0)
    assert ada.beaker("session", "stop", web).returncode == 0
    wait_for("the end", lambda: ada.json("session", "list") == [])
