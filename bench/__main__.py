"""`make bench`: compares sessions with Docker's own commands and writes the table to `bench/README.md`.

Starts a whole stack of its own (see tests/stack.py) and removes it. Every ratio is ours / the peer's, both medians of
rounds that alternate between them.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tests import images
from tests.stack import BIN, Stack, User, wait_for

from . import measure

HERE = Path(__file__).parent
BULK = 100_000_000
PRINT = f"stty -echo; echo '#ready#'; read x; head -c {BULK} /dev/zero | tr '\\0' a; echo '#end#'"
READ = "echo '#ready#'; exec cat"
IDLE = 10  # sessions, for the memory of one


class Bench:
    def __init__(self, stack: Stack, user: User, rounds: int) -> None:
        self.stack, self.user, self.rounds = stack, user, rounds
        self.process = user.process()
        self.docker = ["docker", "-H", f"unix://{stack.docker_socket}"]
        self.beaker = [str(BIN / "beaker"), "session"]
        self.rows: list[tuple[str, str, str, str, str]] = []

    def row(self, what: str, ours: float, peer: float, unit: str, aim: str, *, format: str = ".0f") -> None:
        """aim: like "<= 1.15", which the ratio is to meet, or "" for none."""
        ratio = ours / peer
        met = {"<=": ratio <= float(aim[2:] or 0), ">=": ratio >= float(aim[2:] or 0)}.get(aim[:2])
        mark = "" if met is None else " ✓" if met else " ✗"
        self.rows.append((what, f"{ours:{format}} {unit}", f"{peer:{format}} {unit}", f"{ratio:.2f}", aim + mark))
        print("  ".join(self.rows[-1]), flush=True)

    def commands(self) -> None:
        true = [*self.beaker, "create", "--gpus", "0", "--", "true"]
        got = measure.alternate(
            {
                "ours": lambda: measure.wall(true, **self.process),
                "peer": lambda: measure.wall([*self.docker, "run", "--rm", "--network", "bridge", "debian", "true"]),
            },
            self.rounds,
        )
        self.row("`session create -- true` / `docker run --rm … true`", *medians(got), "ms", "<= 1.15")
        id = self.idle(1)[0]
        container = self.stack.containers()[0]
        got = measure.alternate(
            {
                "ours": lambda: measure.wall([*self.beaker, "exec", id, "--", "true"], **self.process),
                "peer": lambda: measure.wall([*self.docker, "exec", container, "true"]),
            },
            self.rounds,
        )
        self.row("`session exec … true` / `docker exec … true`", *medians(got), "ms", "<= 1.0")
        self.stack.settle()

    def terminals(self) -> None:
        ours = [*self.beaker, "create", "--gpus", "0", "--", "bash", "-c"]
        peer = [*self.docker, "run", "--rm", "-it", "debian", "bash", "-c"]
        got = measure.alternate(
            {
                "ours": lambda: measure.throughput([*ours, PRINT], BULK, **self.process),
                "peer": lambda: measure.throughput([*peer, PRINT], BULK),
            },
            max(2, self.rounds // 5),
        )
        self.row("terminal, 100 MB / `docker run -it`", *medians(got), "MB/s", ">= 1.0")
        delays: dict[str, list[float]] = {"ours": [], "peer": []}
        for _ in range(3):
            delays["ours"] += measure.echo([*ours, READ], 300, **self.process)
            delays["peer"] += measure.echo([*peer, READ], 300)
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            pair = [measure.percentile(values, share) for values in delays.values()]
            self.row(f"keystroke echo {name} / `docker run -it`", *pair, "ms", "<= 1.0", format=".2f")
        self.stack.settle()

    def start_up(self) -> None:
        python = str(BIN / "python")
        got = measure.alternate(
            {
                "ours": lambda: measure.wall([str(BIN / "beaker"), "--version"]),
                "peer": lambda: measure.wall([python, "-c", "pass"]),
            },
            self.rounds * 2,
        )
        self.row("`beaker --version` / `python -c pass`", *medians(got), "ms", "<= 2.0", format=".1f")

    def memory(self) -> None:
        self.idle(IDLE)
        time.sleep(2)
        containers = self.stack.containers()
        shims = [
            pid for pid in measure.descendants(1)
            if b"containerd-shim" in _cmdline(pid) and any(id.encode() in _cmdline(pid) for id in containers)
        ]  # fmt: skip
        per_session = measure.memory([pid for shim in shims for pid in measure.descendants(shim)]) / IDLE
        shim = measure.memory(shims) / IDLE
        what = "memory of an idle session / of its `containerd-shim` alone"
        self.row(what, per_session, shim, "MiB", "", format=".1f")
        for name, process in (("executor", self.stack.executor), ("server", self.stack.server)):
            engine = measure.memory([self.stack.docker.pid])
            self.row(f"memory of the {name} / of `dockerd`", measure.memory([process.pid]), engine, "MiB", "")
        self.stack.settle()

    def idle(self, count: int) -> list[str]:
        """Start so many sessions at a shell without anybody attached."""
        command = [*self.beaker, "create", "--gpus", "0", "--detach", "--quiet", "--", "sleep", "100000"]
        ids = [
            subprocess.run(command, check=True, capture_output=True, text=True, **self.process).stdout.strip()
            for _ in range(count)
        ]
        wait_for("idle sessions", lambda: len(self.stack.containers()) == count)
        return ids


def medians(results: dict[str, list[float]]) -> tuple[float, float]:
    ours, peer = map(measure.median, results.values())
    return ours, peer


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "CPU")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    versions = subprocess.run(["dockerd", "--version"], capture_output=True, text=True).stdout.strip()
    cgroups = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    return (
        f"{os.cpu_count()} x {model}, {memory:.0f} GiB, Linux {platform.release()}, cgroup {cgroups}, {versions}, "
        f"Python {platform.python_version()}"
    )


def report(rows: list[tuple[str, str, str, str, str]], rounds: int) -> str:
    lines = [
        "# Bench",
        "",
        f"Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}: medians of {rounds} rounds, ours and the peer's by",
        "turns, the same Debian image, bridge network, one run on one machine. Only the ratios carry over to another.",
        "",
        f"Machine: {machine()}.",
        "",
        "| what / its peer | ours | peer | ratio | aim |",
        "| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="do not write bench/README.md")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="beaker-bench-"))
    root.chmod(0o755)
    stack = Stack(root, settings={"defaultImage": "debian"})
    try:
        stack.start()
        stack.image("debian", images.debian())
        bench = Bench(stack, stack.user("bench"), options.rounds)
        bench.start_up()
        bench.commands()
        bench.terminals()
        bench.memory()
        if not options.dry_run:
            (HERE / "README.md").write_text(report(bench.rows, options.rounds))
    finally:
        stack.close()


if __name__ == "__main__":
    sys.exit(main())
