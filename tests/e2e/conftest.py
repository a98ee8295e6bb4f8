"""One stack for all end-to-end tests, and terminals of its users."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pexpect
import pytest

from setup.environment import launcher
from setup.recipe import COMMAND
from tests.recorder import Recorder
from tests.stack import BIN, REPOSITORY, Stack, User

_NUMBERS = itertools.count(1000)
PROMPT = r"[$#] (\x1b\[K)?$"  # readline clears the rest of a line that it draws again


@pytest.fixture(scope="session", params=["docker", "oci"])
def stack(request: pytest.FixtureRequest, debian: Path) -> Iterator[Stack]:
    """A node with two made-up GPUs and the image `debian`, which is also its default."""
    if os.geteuid() != 0:
        pytest.skip("needs root: it starts Docker Engine and an executor")
    if not shutil.which("dockerd"):
        pytest.skip("needs Docker Engine (dockerd)")
    root = Path(tempfile.mkdtemp(prefix="beaker-"))
    root.chmod(0o755)
    settings = {"defaultImage": "debian", "mountPaths": ["/net", str(root / "net")]}
    stack = Stack(root, gpus=2, driver=request.param, settings=settings)
    try:
        stack.start()
        stack.image("debian", debian)
        yield stack
    finally:
        stack.close()


@pytest.fixture(scope="session")
def ada(stack: Stack) -> User:
    return stack.user("ada", groups=("video", "games"))


@pytest.fixture(scope="session")
def bob(stack: Stack) -> User:
    return stack.user("bob")


@pytest.fixture
def command(ada: User) -> Iterator[Path]:
    """The command line for the Python of any image, in ada's home: its path."""
    package, home = REPOSITORY / "beaker_sessions", ada.home
    for path in (path for pattern in COMMAND for path in package.glob(pattern)):
        target = home / "lib/beaker_sessions" / path.relative_to(package)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    (home / "bin").mkdir()
    (home / "bin/beaker").write_text(launcher(str(home / "lib"), "/usr/bin/python3"))
    shutil.copyfile(REPOSITORY / "images/command/git-credential-beaker", home / "bin/git-credential-beaker")
    for program in (home / "bin").iterdir():
        program.chmod(0o755)
    yield home / "bin/beaker"
    for name in ("bin", "lib"):
        shutil.rmtree(home / name)


@pytest.fixture(autouse=True)
def recorder(stack: Stack) -> Iterator[Recorder]:
    """Every invariant holds during each test, and after it: all sessions are stopped, and nothing is left of them."""
    with Recorder(stack) as recorder:
        yield recorder
        stack.settle()
    assert recorder.broken() == []


class Tty(pexpect.spawn):
    """A `beaker` command of a user in a terminal of 33 rows and 111 columns."""

    def __init__(self, user: User, *words: str, env: Mapping[str, str] | None = None) -> None:
        process = user.process()

        def become() -> None:
            os.setgroups(process["extra_groups"])
            os.setgid(process["group"])
            os.setuid(process["user"])

        super().__init__(
            str(BIN / "beaker"), list(words), env={**process["env"], **(env or {})}, cwd=str(process["cwd"]),
            dimensions=(33, 111), timeout=60, encoding="utf-8", preexec_fn=become,
        )  # fmt: skip

    def run(self, line: str) -> str:
        """What a command line prints, given at a Bash prompt; the next prompt is not read yet."""
        number = next(_NUMBERS)
        self.expect(PROMPT)
        # The marks as typed differ from the marks as printed.
        self.sendline(f"echo begin-$(({number})); {line}; echo end-$(({number}))")
        self.expect_exact(f"begin-{number}\r\n")
        self.expect_exact(f"end-{number}\r\n")
        return self.before.replace("\r\n", "\n")

    def end(self) -> int:
        """Wait for the command's end; its exit code."""
        self.expect(pexpect.EOF)
        self.close()
        return self.exitstatus if self.exitstatus is not None else 128 + self.signalstatus


@pytest.fixture
def tty() -> type[Tty]:
    return Tty
