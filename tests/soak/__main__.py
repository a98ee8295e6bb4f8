"""`python -m tests.soak [minutes=30] [driver=oci] [seed=TEXT] [sweep=1]`: see `make soak`."""

from __future__ import annotations

import os
import sys
import time

from tests import network

from .campaign import Campaign
from .node import node
from .sweep import OPERATIONS, Swept, sweep


def main(arguments: list[str]) -> int:
    given = {"minutes": "30", "driver": "oci", "seed": "", "sweep": ""}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name not in given:
            print(f"{argument!r} is not one of: {', '.join(f'{name}=' for name in given)}", file=sys.stderr)
            return 64
        given[name] = value or given[name]
    if given["sweep"]:
        return everything(given["sweep"])
    seed = given["seed"] or os.urandom(3).hex()
    return Campaign(given["driver"], float(given["minutes"]), seed, say).run()


def everything(which: str) -> int:
    """Kill at every event of each operation; which: the name of one, or 1 for all."""
    network.leave()
    wrong = 0
    with node() as made:
        swept = Swept(made, made.user("ada"))
        for name, kind in OPERATIONS.items():
            if which not in ("1", name):
                continue
            since = time.monotonic()
            operation = kind(swept)
            result = sweep(operation, True, say, set())
            operation.close()
            wrong += len(result.wrong)
            say(
                f"{name}: {result.places} moments, killed at {result.killed}, {len(result.missed)} did not come again, "
                f"{len(result.wrong)} wrong, {time.monotonic() - since:.0f} s"
            )
    return int(bool(wrong))


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
