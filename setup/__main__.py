"""`python3 -m setup VERB`: what the Makefile's targets do."""

from __future__ import annotations

import sys

from . import engine, environment, image, packages
from .steps import Failed, Step, run


def session(arguments: list[str]) -> int:
    """Everything that is missing, then `beaker session create ARGUMENTS` in place of this process."""
    run(SESSION)
    return 0


SESSION = [packages.step(packages.SESSION), environment.step(), engine.step, image.step()]
TESTS = [packages.step(packages.TESTS), environment.step(dev=True)]


def main(arguments: list[str]) -> int:
    verb, *rest = arguments
    try:
        if verb == "session":
            return session(rest)
        if verb == "step":
            run(step for step in [*SESSION, *TESTS] if step.name == rest[0])
            return 0
        raise SystemExit(f"unknown verb {verb!r}")
    except Failed as error:
        print(error, *(f"  {line}" for line in error.lines), sep="\n", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
