"""The commands of the guides, run as they stand there, page by page in their order.

Every one: a command that is neither run here nor by the test that a table names fails.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from beaker_sessions.client import Client
from tests import images
from tests.stack import BIN, REPOSITORY, Stack, User, wait_for

GUIDE, ADMINISTRATION = REPOSITORY / "docs/interactive.md", REPOSITORY / "docs/administration.md"
OTHERS = [REPOSITORY / "README.md", REPOSITORY / "docs/console.md", REPOSITORY / "docs/index.md"]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
PROGRAMS = {
    "/opt/beaker-sessions/current/bin/beaker-server",
    "beaker",
    "docker",
    "findmnt",
    "git",
    "journalctl",
    "make",
    "nvidia-ctk",
    "python3",
    "ssh",
    "sudo",
}

ELSEWHERE = {
    # what needs a terminal, or is said of a terminal
    "beaker session create": "e2e/test_session.py::test_bash_in_a_terminal_with_the_right_size",
    "beaker session create --gpus 2": "e2e/test_image.py::test_the_prompt_the_greeting_and_the_command",
    "beaker session attach": "e2e/test_session.py::test_detach_attach_exec_stop",
    "beaker session exec": "e2e/test_session.py::test_detach_attach_exec_stop",
    "beaker session stop": "e2e/test_inside.py::test_a_session_stops_itself",
    "beaker session describe": "e2e/test_inside.py::test_a_session_knows_whose_it_is",
    "beaker executor end-sessions": (
        "e2e/test_faults.py::test_the_end_of_all_sessions_leaves_them_time_and_no_new_one_starts"
    ),
    "beaker session exec --root": "e2e/test_root.py::test_exec_as_root",
    "sudo apt-get install jq": "e2e/test_kept.py::test_what_is_kept",
    # sudo's, which a test plays
    "sudo beaker session create": "e2e/test_admission.py::test_under_sudo_a_session_is_that_of_who_called_it",
    "sudo beaker executor doctor": ("e2e/test_bad_input.py::test_what_is_wrong_with_a_machine_is_for_administrators"),
    "sudo apt-get install gdb strace": "e2e/test_kept.py::test_what_is_kept",
    **dict.fromkeys(
        ("sudo gdb -p PID", "sudo strace -p PID", "sudo py-spy dump --pid PID"),
        "contract/test_debugging.py::test_root_debugs_the_processes_of_the_session",
    ),
    "ssh -A": "e2e/test_git.py::test_a_forwarded_agent",
    # what needs a registry, or Docker Engine's images
    "beaker session create --image pytorch/pytorch": "e2e/test_registry.py::test_an_image_comes_with_ones_own_login",
    "beaker session create --image pytorch/pytorch:latest -- python3 -c 'import torch; print(torch.__version__)'": (
        "e2e/test_registry.py::test_an_image_comes_with_ones_own_login"
    ),
    "docker build": "contract/test_oci_images.py::test_from_docker_engine",
    "docker build -t mine .": "contract/test_oci_images.py::test_from_docker_engine",
    "beaker session create --image docker://mine": "contract/test_oci_images.py::test_from_docker_engine",
    # a browser's
    "beaker login": "unit/console/test_login.py::test_login_prints_a_link_that_works_once",
    "beaker account generate-token": "e2e/test_inside.py::test_a_revoked_token_takes_those_of_its_sessions_along",
    "make docs": "unit/test_docs.py::test_the_site_builds_without_a_warning",
    "make image": "e2e/test_image.py::test_its_tools_run",
    "make image BASE=cuda NAME=lab/cuda": "unit/test_setup.py::test_the_newest_cuda_that_the_driver_runs",
}
# What acts on the machine as a whole, which a test must leave alone, or needs what is not there.
BY_HAND = {
    *("make session", 'make session ARGS="--gpus 0 -- python3 --version"', "make down", "make clean", "git pull"),
    *(
        "make test",
        "make check",
        "make bench",
        "make lock",
        "make soak",
        "make soak SWEEP=1",
        "journalctl -u beaker-executor",
        "ssh gpu-1.lab",
    ),
    "make image BASE=nvidia/cuda:12.4.1-runtime-ubuntu22.04 NAME=lab/cuda",
    "nvidia-ctk cdi generate",
    "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml",
    "python3 bench/gpu_check.py /usr/local/bin/beaker",
}


def commands(page: Path) -> list[str]:
    """Every command of a page, in its order and once: of its code blocks, and in running text."""
    found = []
    at = 0
    text = page.read_text()
    for block in [*BLOCK.finditer(text), None]:
        found += re.findall(r"`([^`\n]+)`", text[at : block.start() if block else None])
        if block:
            found += [line.strip() for line in ("" if block[1] else block[2]).splitlines()]  # a language: no commands
            at = block.end()
    # A comment follows after several spaces; a prompt goes before.
    lines = [re.split(r"  +", re.sub(r"^\w+@[\w-]+:\S*\$ ", "", line))[0] for line in found]
    return list(dict.fromkeys(x for x in lines if x.split(" ")[0] in PROGRAMS and " " in x and "…" not in x))


def here(page: Path) -> list[str]:
    return [line for line in commands(page) if line not in ELSEWHERE and line not in BY_HAND]


def test_every_command_is_known():
    """Tables name what is in the pages, and tests that exist; other pages say nothing that the two guides do not."""
    said = {line for page in (GUIDE, ADMINISTRATION, *OTHERS) for line in commands(page)}
    assert {*ELSEWHERE, *BY_HAND} - said == set(), "the guides say it differently now"
    for place in ELSEWHERE.values():
        file, _, name = place.partition("::")
        assert f"def {name}(" in (REPOSITORY / "tests" / file).read_text(), place
    run = {*here(GUIDE), *here(ADMINISTRATION)}
    assert {line for page in OTHERS for line in here(page)} - run - {*READ_ME} == set()


# What only the other pages say, and what runs it in the order of a guide.
READ_ME = {
    "beaker session create --gpus 0 -- python3 train.py": "beaker session create -- python3 hello.py",
    "beaker session top": "beaker session top --all",
    "beaker account create NAME": "beaker account create ada --email ada@example.com",
    "beaker config list": "",
    "beaker account token": "",
}


@pytest.fixture
def home(ada: User) -> Iterator[Path]:
    """What the guide takes for granted: files of one's own, and a password that Git's helper has kept."""
    before = set(ada.home.iterdir())
    (ada.home / "numbers.txt").write_text("2\n1\n")
    (ada.home / "key.pem").write_text("a key")
    (ada.home / "hello.py").write_text("print('hello')")
    (ada.home / "log.py").write_text("import os; print(len(os.environ['WANDB_API_KEY']))")
    (ada.home / "train.py").write_text("import time; print('epoch 1', flush=True); time.sleep(1000)")
    ada.beaker("secret", "write", "-w", "git", "github.com", input=b"ada\ntoken")
    yield ada.home
    for path in set(ada.home.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for secret in ("KEY", "NAME"):
        ada.beaker("secret", "delete", secret)


def test_the_commands_of_the_guide(ada: User, home: Path):
    printed = {}
    for line in [*here(GUIDE), *(line for line in READ_ME if READ_ME[line] == "")]:
        # What asks is given an answer by a pipe.
        done = ada.run("bash", "-c", line, input=b"a-key", env={"PATH": f"{BIN}:{ada.env['PATH']}"})
        if line == "beaker executor doctor":
            continue  # the administrator's
        assert done.returncode == 0, (line, done.stderr)
        printed[line.partition(" -- ")[2] or line] = done.stdout
        if "--detach" in line:
            wait_for("its output", lambda: b"epoch" in ada.beaker("session", "logs", "train").stdout)
    assert printed["python3 --version"].startswith(b"Python 3")
    assert b"BEAKER_ASSIGNED_GPU_COUNT=2" in printed["env"]
    assert printed["python3 hello.py"] == b"hello\n"
    assert (home / "sorted.txt").read_bytes() == b"1\n2\n"
    assert printed["beaker session logs train"] == b"epoch 1\n"
    assert b"train" in printed["beaker session list"]
    assert b"train" in printed["beaker session top --all"] or b"GPU" in printed["beaker session top --all"]
    assert printed["beaker secret read WANDB_API_KEY"] == b"a-key"
    assert printed["python3 log.py"] == b"5\n"
    assert b"WANDB_API_KEY" in printed["beaker secret list"]
    assert b"github.com" in printed["beaker secret list --workspace git"]
    assert (home / ".gitconfig").read_text().count("Ada Lovelace") == 1


def test_the_commands_of_the_administrators_guide(stack: Stack, ada: User, tmp_path: Path):
    """By root, with the stack's own paths and names in place of a machine's; the backup is restored."""
    images.oci_archive(images.scratch(), tmp_path / "image.tar")
    ada.beaker("secret", "write", "KEEP", input=b"kept")
    environment = {
        "BEAKER_SOCKET": str(stack.socket), "BEAKER_ADDR": stack.address, "BEAKER_TOKEN": stack.admin.token,
        "PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path),
    }  # fmt: skip
    names = {"/var/lib/beaker": str(stack.state), "/var/backups": str(tmp_path), "gpu-1.lab": "node-1.lab", "/net": "/"}
    names["/opt/beaker-sessions/current/bin/beaker-server"] = f"{BIN}/beaker-server --config {stack.config}"
    printed = {}
    for line in here(ADMINISTRATION):
        if "images" in line and stack.driver == "docker":
            continue  # Docker Engine's own commands look after its images
        words = line
        for name, ours in names.items():
            words = words.replace(name, ours)
        if "beaker-server restore" in line:
            stack.server.kill()
        done = subprocess.run(["bash", "-c", words], env=environment, cwd=tmp_path, capture_output=True)
        assert done.returncode == 0 or line == "beaker executor doctor", (line, done.stdout, done.stderr)
        printed[line] = done.stdout
    assert b"node-1.lab: " in printed["beaker executor doctor"]
    assert b"ada" in printed["beaker account list"]

    stack.server.start()
    wait_for("the server", lambda: stack.admin.whoami())
    assert ada.beaker("secret", "read", "KEEP").stdout == b"kept"
    with closing(Client(stack.endpoint, ada.token)) as client:
        assert client.whoami()["name"] == ada.name
    ada.beaker("secret", "delete", "KEEP")
    # Its executor hears of the end of the cordon with its next heartbeat.
    wait_for("new sessions", lambda: ada.beaker("session", "create", "--gpus", "0", "--", "true").returncode == 0)
