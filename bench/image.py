"""What the default image costs: the size of each layer and the time to build it, from nothing and after an update.

`python -m bench.image` prints the table; nothing of this machine's own image is touched.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from setup import archive, recipe

WHAT = {"base": "packages", "tools": "tools from elsewhere", "command": "our command, prompt and helper: an update"}


def build() -> tuple[list[list[str]], list[str]]:
    """The table's rows, and what could not be had."""
    report = recipe.Listener(lambda _: None)
    rows: list[list[str]] = []
    layers: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="beaker-image-") as name:
        directory = Path(name)
        directory.chmod(0o755)

        def timed(layer: str, make: Callable[[], Path]) -> None:
            begin = time.monotonic()
            layers.append(make())
            seconds = time.monotonic() - begin
            rows.append([layer, WHAT[layer], f"{layers[-1].stat().st_size / 1e6:.1f}", f"{seconds:.1f}"])

        def base() -> Path:
            archive.bootstrap(directory / "base.tar", report)
            return directory / "base.tar"

        def tools() -> Path:
            programs = recipe.programs(report, Path(sys.executable))
            return archive.layer("tools", layers, directory, programs, report)

        timed("base", base)
        timed("tools", tools)
        timed("command", lambda: archive.layer("command", layers, directory, {}, report))
    return rows, report.found


def main() -> None:
    rows, left_out = build()
    for row in rows:
        print("  ".join(row))
    for what in left_out:
        print(what)


if __name__ == "__main__":
    main()
