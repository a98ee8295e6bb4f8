"""`python3 -m setup VERB [ARGUMENT…]`: what the Makefile's targets do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

from . import (
    account,
    cuda,
    driver,
    engine,
    environment,
    everyone,
    host,
    image,
    installed,
    packages,
    removal,
    services,
    testing,
)
from .steps import Failed, Step, as_user, do, run

SESSION = [
    packages.step("system packages", packages.SESSION),
    installed.step,
    services.settings,
    driver.step,
    engine.step,
    services.SERVER.step(),
    account.step,  # asks the server whether a token that is there is valid; the executor needs one of its own
    services.EXECUTOR.step(),
    everyone.step,
    image.step(),  # the executor takes it into its storage
]
TESTS = [packages.step("system packages for tests", packages.TESTS), environment.step()]


def session(*arguments: str) -> None:
    """Everything that is missing, then `beaker session create ARGUMENTS` in place of this process, as the caller."""
    run(SESSION)
    caller = host.caller()
    program = str(installed.CURRENT / "bin/beaker")
    environment = {key: value for key, value in host.home_environment(caller).items() if not key.startswith("MAKE")}
    if os.geteuid() != caller.pw_uid:
        os.initgroups(caller.pw_name, caller.pw_gid)
        os.setgid(caller.pw_gid)
        os.setuid(caller.pw_uid)
    os.execve(program, [program, "session", "create", *arguments], environment)


def step(name: str) -> None:
    """One step that is missing: how one that needs another user is run as that user."""
    do(next(one for one in [*SESSION, *TESTS] if one.name == name))


def develop() -> None:
    run([TESTS[1]])


def build(base: str, name: str) -> None:
    """An image by the default image's recipe on another base, under a name of its own; `cuda`: what fits the driver."""
    _as_root()
    base = cuda.base() if base == "cuda" else base
    run([*SESSION[:2], engine.needed, image.step_on(base, name)] if base else SESSION)


def lock() -> None:
    run([Step("lock files", lambda: True, environment.lock, as_owner=True)])


def test(*arguments: str) -> None:
    run([TESTS[0]])
    _as_root()
    raise SystemExit(testing.run(list(arguments)))


def soak(*arguments: str) -> None:
    run([TESTS[0]])
    _as_root()
    raise SystemExit(testing.soak(list(arguments)))


def bench(*arguments: str) -> None:
    run([TESTS[0]])
    _as_root()
    raise SystemExit(testing.bench(list(arguments)))


def down() -> None:
    _as_root()
    removal.down()


def clean() -> None:
    _as_root()
    removal.clean()


VERBS: dict[str, Callable[..., None]] = {
    verb.__name__: verb for verb in (session, step, develop, build, lock, test, soak, bench, down, clean)
}


def _as_root() -> None:
    """Start again as root, unless this is."""
    if os.geteuid() != 0:
        again = as_user(0, [sys.executable, "-B", "-m", "setup", *sys.argv[1:]])
        raise SystemExit(subprocess.run(**again, cwd=host.ROOT).returncode)


def main() -> int:
    os.umask(0o022)
    verb, *arguments = sys.argv[1:]
    try:
        VERBS[verb](*arguments)
    except Failed as error:
        print(error, *(f"  {line}" for line in error.lines), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
