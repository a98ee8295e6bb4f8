"""How things are measured: whole commands, terminals, memory. Knows nothing of what is compared."""

from __future__ import annotations

import os
import pty
import select
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

Command = Sequence[str]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def alternate(subjects: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measure each subject once a round, so that what else the machine does falls on all; a first round warms up."""
    results: dict[str, list[float]] = {name: [] for name in subjects}
    for number in range(rounds + 1):
        for name, measure in subjects.items():
            value = measure()
            if number:
                results[name].append(value)
    return results


def wall(command: Command, **process: object) -> float:
    """Milliseconds from start to end of a command that must succeed."""
    begin = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, **process)  # type: ignore[call-overload]
    took = (time.perf_counter() - begin) * 1000
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.decode()[-500:]}")
    return took


@contextmanager
def terminal(command: Command, **process: object) -> Iterator[int]:
    """The master side of a pseudo-terminal (33 x 111) in which a command runs; it is ended afterwards."""
    master, slave = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 111, 0, 0))
    popen = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, **process)  # type: ignore[call-overload]
    os.close(slave)
    try:
        yield master
        os.write(master, b"\n\x04")  # whatever still reads sees the end
        drain(master)
        popen.wait(10)
    finally:
        if popen.poll() is None:
            popen.kill()
        os.close(master)
        popen.wait(10)


def read_until(master: int, mark: bytes, seconds: float = 60) -> int:
    """Read up to and including `mark`; how many bytes. The mark must not be split by what precedes it."""
    seen, total, deadline = b"", 0, time.monotonic() + seconds
    while mark not in seen:
        if not select.select([master], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"no {mark!r} within {seconds:g} s; last: {seen[-200:]!r}")
        data = os.read(master, 1 << 16)
        total += len(data)
        seen = seen[-len(mark) :] + data
    return total


def drain(master: int, quiet: float = 0.2) -> None:
    """Read until nothing comes any more."""
    while select.select([master], [], [], quiet)[0]:
        try:
            os.read(master, 1 << 16)
        except OSError:  # EIO: the last process has closed its side
            return


def throughput(command: Command, size: int, **process: object) -> float:
    """MB/s of a terminal whose command waits for a line, prints `size` bytes and then `#end#`."""
    with terminal(command, **process) as master:
        read_until(master, b"#ready#")
        begin = time.perf_counter()
        os.write(master, b"go\n")
        read_until(master, b"#end#", 120)
        return size / 1e6 / (time.perf_counter() - begin)


def echo(command: Command, keys: int, **process: object) -> list[float]:
    """Milliseconds from a key to its echo, for so many keys, in a terminal whose command prints `#ready#` and reads."""
    delays = []
    with terminal(command, **process) as master:
        read_until(master, b"#ready#")
        time.sleep(0.3)
        for _ in range(keys):
            begin = time.perf_counter()
            os.write(master, b"x")
            read_until(master, b"x")
            delays.append((time.perf_counter() - begin) * 1000)
            time.sleep(0.005)
    return delays


def memory(pids: Sequence[int]) -> float:
    """MiB of memory of these processes, shared pages divided among those that share them (PSS)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found, todo = [], [pid]
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found
