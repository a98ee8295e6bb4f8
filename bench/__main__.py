"""`make bench`: sessions of both drivers beside Docker, Podman and bare runc; the tables go to `bench/README.md`.

Starts stacks of its own (see tests/stack.py) and removes them. Subjects take turns in every round, so that what else
the machine does falls on all of them; figures are medians.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from tests import images
from tests.stack import BIN, Stack, User, load_image, wait_for

from . import image as default_image
from . import measure, peers
from .peers import Subject

HERE = Path(__file__).parent
BEAKER = str(BIN / "beaker")
BULK = 100_000_000
PRINT = f"stty -echo; echo '#ready#'; read x; head -c {BULK} /dev/zero | tr '\\0' a; echo '#end#'"
READ = "echo '#ready#'; exec cat"
NEIGHBOUR = "neighbour's echo p50, ms"
NOW = ["sh", "-c", "date +%s%N"]
# Each says that it is at its limit, and goes on.
BOMB = """
import os, signal
while True:
    try:
        if not os.fork():
            signal.pause()
    except OSError:
        open("ready", "w").close()
"""
HOG = """
block = bytearray(900 << 20)
while True:
    for at in range(0, len(block), 4096):
        block[at] = (block[at] + 1) % 256
    open("ready", "w").close()
"""
IDLE = 50  # sessions, for the memory of one
SETTINGS = {"defaultImage": "debian", "limits": {"sessions": 0, "unreserved": 0}}  # one user stands for many

Table = dict[str, dict[str, float]]  # what is measured -> subject -> value


class Bench:
    """rounds: of the quick measurements; the long ones take fewer."""

    def __init__(self, users: dict[str, User], rounds: int) -> None:
        self.users, self.rounds = users, rounds
        self.table: Table = {}

    def note(self, what: str, **values: float) -> None:
        self.table[what] = values
        print(what, {name: round(value, 2) for name, value in self.table[what].items()}, flush=True)

    def commands(self, subjects: list[Subject]) -> None:
        """A whole container for `true`, and `true` in one that runs."""
        for what, words in (("create, ms", "run"), ("exec, ms", "exec")):
            commands = {s.name: (_true(s, words), s.process) for s in subjects}
            got = measure.alternate(
                {n: (lambda c=c, p=p: measure.wall(c, **p)) for n, (c, p) in commands.items()}, self.rounds
            )
            self.note(what, **{name: measure.median(values) for name, values in got.items()})

    def terminals(self, subjects: list[Subject]) -> None:
        shells = {s.name: ([*s.interactive, "bash", "-c"], s.process) for s in subjects if s.interactive}
        got = measure.alternate(
            {n: (lambda c=c, p=p: measure.throughput([*c, PRINT], BULK, **p)) for n, (c, p) in shells.items()},
            max(3, self.rounds // 5),
        )
        self.note("terminal, MB/s", **{name: measure.median(values) for name, values in got.items()})
        delays: dict[str, list[float]] = {name: [] for name in shells}
        for _ in range(3):
            for name, (command, process) in shells.items():
                delays[name] += measure.echo([*command, READ], 300, **process)
        self.note("echo p50, ms", **{name: measure.percentile(values, 0.5) for name, values in delays.items()})
        self.note("echo p99, ms", **{name: measure.percentile(values, 0.99) for name, values in delays.items()})

    def hand_over(self) -> None:
        """From the last output of a session that holds the only GPU to the first of the one that waits for it."""
        plain, waited = {}, {}
        for name, user in self.users.items():
            plain[name] = measure.median([_first_output(user) for _ in range(self.rounds // 2)])
            waited[name] = measure.median([_handed_over(user) for _ in range(self.rounds // 2)])
        self.note("create to first output, ms", **plain)
        self.note("release to next output, ms", **waited)

    def neighbours(self, user: User) -> None:
        """A key's echo in a session, while another of the same machine takes all that it can get."""
        neighbour = [BEAKER, "session", "create", "--gpus", "0", "--cpus", "0.5", "--", "bash", "-c", READ]
        values = {}
        for name, memory, script in (("alone", "", ""), ("fork bomb", "1GiB", BOMB), ("memory hog", "1GiB", HOG)):
            ready = user.home / "ready"
            id = ""
            if script:
                create = ("session", "create", "--gpus", "0", "--detach", "--quiet", "--memory", memory)
                id = user.beaker(*create, "--", "python3", "-c", script).stdout.decode().strip()
                wait_for(f"the {name}", ready.exists, 120)
            values[name] = measure.median(measure.echo([*neighbour], 300, **user.process()))
            if id:
                user.beaker("session", "stop", id)
                ready.unlink()
        self.note(NEIGHBOUR, **values)

    def start_up(self) -> None:
        got = measure.alternate(
            {
                "beaker": lambda: measure.wall([BEAKER, "--version"]),
                "python": lambda: measure.wall(["/usr/bin/python3", "-c", "pass"]),
            },
            self.rounds * 2,
        )
        self.note("start-up, ms", **{name: measure.median(values) for name, values in got.items()})

    def memory(self) -> None:
        """Of one idle session at a shell's place, of Docker's own part of one, and of the services."""
        values = {}
        for name, user in self.users.items():
            with idle(user, IDLE if name == "oci" else IDLE // 5) as ids:
                time.sleep(3)
                pids = [
                    pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _belongs(pid, ids, user.stack)
                ]
                values[name] = measure.memory([p for pid in pids for p in measure.descendants(pid)]) / len(ids)
                if name == "docker":
                    values["docker run"] = measure.memory(pids) / len(ids)
                values[f"executor {name}"] = measure.memory([user.stack.executor.pid])
        values["server"] = measure.memory([user.stack.server.pid])
        values["dockerd"] = measure.memory([user.stack.docker.pid])
        self.note("memory, MiB", **values)


def _true(subject: Subject, words: str) -> list[str]:
    """`runc run` takes its command from the bundle."""
    command = [*getattr(subject, words)]
    return command if subject.name == "runc run" and words == "run" else [*command, "true"]


def _first_output(user: User) -> float:
    begin = time.time_ns()
    return (int(user.beaker("session", "create", "--", *NOW).stdout) - begin) / 1e6


def _handed_over(user: User) -> float:
    process = {**user.process(), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    hold = [BEAKER, "session", "create", "--", "sh", "-c", "sleep 1; date +%s%N"]
    holder = subprocess.Popen(hold, **process)
    time.sleep(0.6)
    waiter = subprocess.Popen([BEAKER, "session", "create", "--", *NOW], **process)
    released, started = int(holder.communicate()[0]), int(waiter.communicate()[0])
    return (started - released) / 1e6


@contextmanager
def idle(user: User, count: int) -> Iterator[list[str]]:
    """So many sessions with nobody attached."""
    create = ("session", "create", "--gpus", "0", "--detach", "--quiet", "--", "sleep", "100000")
    yield [user.beaker(*create).stdout.decode().strip() for _ in range(count)]
    user.stack.settle()


def _belongs(pid: int, ids: list[str], stack: Stack) -> bool:
    """Whether a process holds one of these sessions: its conmon, or its containerd-shim."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    if stack.driver == "oci":
        return "conmon" in command[0] and any(id in command for id in ids)
    return "containerd-shim" in command[0] and str(stack.root) in " ".join(command)


# what, ours, peer, aim of ours / peer; the docker driver's first
AIMS = [
    ("create, ms", "docker", "docker run", "<= 1.15"),
    ("exec, ms", "docker", "docker run", "<= 1.0"),
    ("terminal, MB/s", "docker", "docker run", ">= 1.0"),
    ("echo p50, ms", "docker", "docker run", "<= 1.0"),
    ("echo p99, ms", "docker", "docker run", "<= 1.0"),
    ("start-up, ms", "beaker", "python", "<= 2.0"),
    ("create, ms", "oci", "docker run", "<= 0.25"),
    ("create, ms", "oci", "runc run", "<= 2.0"),
    ("exec, ms", "oci", "docker run", "<= 0.6"),
    ("terminal, MB/s", "oci", "docker run", ">= 1.5"),
    ("echo p50, ms", "oci", "docker run", "<= 0.7"),
    ("echo p99, ms", "oci", "docker run", "<= 0.7"),
]


def verdicts(table: Table) -> Iterator[list[str]]:
    for what, ours, peer, aim in AIMS:
        if ours in table.get(what, {}) and peer in table[what]:
            yield [what, ours, peer, *_verdict(table[what][ours] / table[what][peer], aim)]
    memory = table.get("memory, MiB", {})
    if "oci" in memory:
        yield ["memory of an idle session, MiB", "oci", "4 MiB", *_verdict(memory["oci"], "<= 4.0")]
    latency = table.get(NEIGHBOUR, {})
    for name in sorted(latency.keys() - {"alone"}):
        yield [NEIGHBOUR, f"oci beside a {name}", "oci alone", *_verdict(latency[name] / latency["alone"], "<= 2.0")]
    for name in table.get("release to next output, ms", {}):
        ratio = table["release to next output, ms"][name] / table["create to first output, ms"][name]
        yield ["release to next output", name, "a plain create", *_verdict(ratio, "<= 1.5")]


def _verdict(value: float, aim: str) -> list[str]:
    met = value <= float(aim[2:]) if aim.startswith("<=") else value >= float(aim[2:])
    return [f"{value:.2f}", aim, "yes" if met else "**no**"]


def report(table: Table, rounds: int, layers: list[list[str]], left_out: list[str]) -> str:
    columns = ["oci", "docker", "docker run", "podman run", "runc run"]
    rows = [
        [what, *(f"{values[c]:.2f}" if c in values else "" for c in columns)]
        for what, values in table.items()
        if set(values) & set(columns)
    ]
    memory = {name: value for name, value in table.get("memory, MiB", {}).items() if name not in columns}
    return "\n".join(
        [
            "# Bench",
            "",
            f"Written by `make bench` on {datetime.now(UTC):%Y-%m-%d}: medians of {rounds} rounds, all taking turns,",
            "one Debian image, private networks, one run on one machine. Only the ratios carry over to another.",
            "",
            f"Machine: {machine()}.",
            "",
            "`oci` and `docker` are sessions of our two drivers, whole: command line, executor and engine. In the row",
            "`exec` the peers are `docker exec` and so on. Memory of `docker run` is its `containerd-shim` alone.",
            "",
            *_markdown(["", *columns], rows),
            "",
            "Other memory, in MiB: " + ", ".join(f"{name} {value:.0f}" for name, value in memory.items()) + ".",
            "",
            "## Aims",
            "",
            *_markdown(["what", "ours", "peer", "ours / peer", "aim", "met"], list(verdicts(table))),
            "",
            "## The default image",
            "",
            "Its layers, each kept until what it is made of changes. An update of the command line is the last alone.",
            *[f"{text[:1].upper()}{text[1:]}." for text in left_out],
            "",
            *_markdown(["layer", "what", "MB", "build, s"], layers),
            "",
        ]
    )


def _markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "CPU")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cgroups = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
    versions = [
        subprocess.run([name, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
        for name in ("dockerd", "podman", "runc", "conmon")
    ]
    system = f"Linux {platform.release()}, cgroup {cgroups}, Python {platform.python_version()}"
    return f"{os.cpu_count()} x {model}, {memory:.0f} GiB, {system}; {'; '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dry-run", action="store_true", help="do not write bench/README.md")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="beaker-bench-"))
    root.chmod(0o755)
    image = images.debian()
    with ExitStack() as parts:
        parts.callback(shutil.rmtree, root, ignore_errors=True)
        users = {}
        for name in ("docker", "oci"):
            (root / name).mkdir()
            stack = Stack(root / name, gpus=1, driver=name, settings=SETTINGS)
            parts.callback(stack.close)
            stack.start()
            if name == "oci":  # where it belongs, as the others have it
                archive = root / "debian.tar"
                images.oci_archive(image.read_bytes(), archive)
                load_image(stack.socket, archive, "debian")
            else:
                stack.image("debian", image)
            users[name] = stack.user(f"bench{name}")
            first = users[name].beaker("session", "create", "--", "true")  # the image is there from now on
            if first.returncode:
                raise RuntimeError(first.stderr.decode())
        bench = Bench(users, options.rounds)
        bench.start_up()
        with (
            idle(users["docker"], 1) as docker,
            idle(users["oci"], 1) as oci,
            peers.runc(root / "runc", image) as runc,
            peers.podman(root / "podman", image) as podman,
        ):
            container = users["docker"].stack.containers()[0]
            subjects = [
                peers.session(users["oci"].stack, users["oci"], BEAKER, oci[0]),
                peers.session(users["docker"].stack, users["docker"], BEAKER, docker[0]),
                peers.docker(users["docker"].stack, container),
                podman,
                runc,
            ]
            bench.commands(subjects)
            bench.terminals(subjects)
        bench.neighbours(users["oci"])
        bench.hand_over()
        bench.memory()
        for verdict in verdicts(bench.table):
            print("  ".join(verdict))
        if not options.dry_run:
            (HERE / "README.md").write_text(report(bench.table, options.rounds, *default_image.build()))


if __name__ == "__main__":
    sys.exit(main())
