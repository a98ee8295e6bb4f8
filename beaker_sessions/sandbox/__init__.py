"""The interface between the executor and whatever runs containers. Drivers: `docker`, `oci`, `fake`.

Owns: the values that cross this border. Drivers translate their engine's failures into `errors.Error` here and nowhere
else; a driver never decides policy (who may have what): the executor computes a `Spec` and the driver obeys.

A sandbox is found again after any restart by its labels alone; a driver keeps no state of its own that cannot be
rebuilt from `list`. All methods block, are safe to call from several threads, and are bounded in time.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from ..model import Identity, Pull

# The user's name and password for an image `HOST/PATH`, None where there are none. Asked only when a registry is.
Login = Callable[[str], tuple[str, str] | None]
LABEL = "beaker.session"  # every sandbox carries it, its value is the session's id
# So that the executor of one state directory never touches the sandboxes of another.
LABEL_OWNER = "beaker.executor"
MARK = 0xBEA  # SO_MARK of the sockets of published ports: by it the firewall lets sessions reach them
IMAGES = "beaker-images"  # the driver's directory in the one that `imagePath` names, which may be anybody's
LOW_DISK = 10 << 30  # bytes of free disk below which images and sessions will soon be in trouble
PIDS = 4096  # processes and threads of a session, unless told otherwise


@dataclass(frozen=True)
class Image:
    """A local image. id: the engine's content id. reference: as it was typed, normalised. env: `NAME=value` pairs."""

    id: str
    reference: str
    env: tuple[str, ...] = ()
    size: int = 0


@dataclass(frozen=True)
class Limits:
    """What images may take of the disk, in bytes. image: one, unpacked, 0 for no limit. total: all together, 0 for the
    driver's share of the file system.
    """

    image: int = 200 << 30
    total: int = 0


@dataclass(frozen=True)
class Progress:
    """How far a pull is. done and total: bytes over all layers known so far; layers: (finished, known)."""

    done: int
    total: int
    layers: tuple[int, int]


@dataclass(frozen=True)
class Mount:
    """A bind mount, with all that is mounted below it. `source` may be `/proc/<pid>/fd/<n>`, pinned by the executor.

    What comes and goes below a pinned source later, where it is mounted shared, does so in the sandbox too. slave: a
    driver's own note of that.
    """

    source: str
    target: str
    read_only: bool = False
    slave: bool = False


@dataclass(frozen=True)
class Spec:
    """Everything about one sandbox. Pure data, computed by `executor.plan`.

    command: what to run after init; empty means the image's best shell (`bash`, else `sh`). env: complete additions and
    overrides over the image's; a value of None removes the image's variable. identity: the user it runs as, whose
    passwd and group entries must resolve in any image. cpu_weight: relative share, 1 to 10000, 100 is Docker's 1024
    shares. memory: hard limit in bytes, 0 for none. gpus: CDI names; exactly these devices are reachable.
    oom_score_adj: added to the badness of every process inside. disk: bytes that it may write outside of its mounts, 0
    for no limit; where a driver cannot enforce that, it does not.
    """

    id: str
    labels: Mapping[str, str]
    image: Image
    identity: Identity
    command: tuple[str, ...] = ()
    env: Mapping[str, str | None] = field(default_factory=dict)
    workdir: str = "/"
    hostname: str = "session"
    mounts: tuple[Mount, ...] = ()
    gpus: tuple[str, ...] = ()
    cpu_weight: int = 100
    memory: int = 0
    shared_memory: int = 64 << 20
    pids: int = PIDS
    oom_score_adj: int = 0
    tty: bool = True
    stdin: bool = True
    host_network: bool = False
    disk: int = 0


class Framing(enum.StrEnum):
    """How bytes are laid out on a terminal's descriptor.

    raw: a stream of both directions. multiplexed: Docker's 8-byte frame headers (stream, 3 zero bytes, big-endian
    length) from the sandbox, raw towards it. conmon: a SOCK_SEQPACKET whose packets start with one byte, 2 for output
    and 3 for errors, raw towards it. Half-closing the descriptor for writing closes the sandbox's standard input.
    """

    RAW = "raw"
    MULTIPLEXED = "multiplexed"
    CONMON = "conmon"


@dataclass(frozen=True)
class Terminal:
    """An open connection to a process's standard streams. Whoever holds `fd` owns and closes it.

    fd survives the executor: the caller passes it to the command line, which talks to the engine directly. replay:
    recent output that precedes what `fd` will deliver, without a gap or a repetition.
    """

    fd: int
    framing: Framing
    replay: bytes = b""


def framed(stream: int, data: bytes) -> bytes:
    """Output as in Framing.MULTIPLEXED. stream: 1 for standard output, 2 for errors."""
    return struct.pack(">BxxxL", stream, len(data)) + data


class Status(enum.StrEnum):
    CREATED = "created"
    RUNNING = "running"
    EXITED = "exited"


@dataclass(frozen=True)
class Found:
    """One sandbox that exists. exit_code: 128 + signal for a killed main process; None unless exited.

    oom: some process of it was killed for memory. pid: of the init on the host, 0 unless running. why: it ended, where
    the exit code does not say it.
    """

    id: str
    labels: Mapping[str, str]
    status: Status
    pid: int = 0
    exit_code: int | None = None
    oom: bool = False
    started: datetime | None = None
    finished: datetime | None = None
    why: str = ""


@dataclass(frozen=True)
class Finding:
    """One line of `executor doctor`. level: ok, warning or error. mend: the command that mends it, or ""."""

    level: str
    what: str
    mend: str = ""


class Sandboxes(Protocol):
    """A driver. `id` is always the session's id, as given in `Spec.id`."""

    name: str
    root: bool  # whether root inside is nobody outside, so that a user may be it

    def image(
        self, reference: str, pull: Pull, progress: Callable[[Progress], None], login: Login = lambda _: None,
        going: Callable[[], None] = lambda: None,
    ) -> Image:  # fmt: skip
        """The local image for `reference`, fetched first if `pull` says so.

        progress, going: called while it is fetched, with its progress and before there is any; may raise to end it.
        Raises Error not_found (with what was tried), unauthorized, unavailable, storage_full or invalid (grammar).
        """

    def create(self, spec: Spec) -> None:
        """Make the sandbox without running anything. Repeating it for the same id is a conflict."""

    def attach(self, id: str, *, replay: bool, whole: bool = False) -> Terminal:
        """Connect to the main process, before or after `start`; `replay` asks for the last 64 KiB of its output.

        whole: for all output that the engine keeps, 8 MiB or more; without a terminal as in Framing.MULTIPLEXED.
        """

    def start(self, id: str, size: tuple[int, int] | None) -> None:
        """Start the main process. With a size (rows, columns) its terminal has that size before it runs anything.

        Idempotent: a start that was interrupted half-way is completed by calling it again.
        """

    def resize(self, id: str, size: tuple[int, int], process: str = "") -> None:
        """Set the terminal's size of the main process, or of the `exec` with that handle. Silent if it has ended."""

    def exec(
        self,
        id: str,
        command: tuple[str, ...],
        *,
        env: Mapping[str, str],
        identity: Identity,
        workdir: str,
        size: tuple[int, int] | None,
        stdin: bool,
    ) -> tuple[str, Terminal]:
        """Start another process (a shell when `command` is empty), with a terminal if there is a size: its handle and
        streams.
        """

    def exec_running(self, id: str, handle: str) -> bool:
        """Whether an `exec` of this sandbox goes on. not_found for another's handle."""

    def execs(self, id: str) -> list[str]:
        """The handles of every `exec` of this sandbox that goes on. not_found when there is no such sandbox."""

    def exec_exit(self, id: str, handle: str) -> int:
        """The exit code of an `exec` of this sandbox whose streams have closed; waits for it. not_found for another's
        handle.
        """

    def signal(self, id: str, signal: int) -> None:
        """Send a signal to the main process. Silent if it has ended."""

    def init(self, id: str) -> int | None:
        """A pidfd of its first process, which lives as long as the sandbox and is in its network namespace.

        None when it does not run. Whoever called closes it.
        """

    def stop(self, id: str, grace: float) -> None:
        """Ask the main process to end (SIGHUP with a terminal, else SIGTERM), kill everything after `grace` seconds."""

    def remove(self, id: str) -> None:
        """Remove the sandbox and all that belongs to it, killing what runs. Silent if there is none."""

    def guard(self) -> None:
        """Have the firewall around sandboxes there, should somebody have flushed it. Raises Error unavailable."""

    def weigh(self, cpus: float) -> None:
        """Keep so many of the machine's CPUs for all sandboxes together, whatever else is busy on it, where the driver
        can. Raises Error unavailable.
        """

    def check(self) -> list[Finding]:
        """What `executor doctor` should say about the engine and the kernel."""

    def watch(self) -> Iterator[str]:
        """Ids whose state may have changed, forever; "" means anything may have. Ends when the engine goes away."""

    def logs(self, id: str, limit: int, *, framed: bool = False) -> bytes:
        """The last `limit` bytes of output, standard output and errors in the order they came.

        framed: as in Framing.MULTIPLEXED, which tells them apart; the frames come on top of `limit`.
        """

    def disk(self, id: str) -> int | None:
        """Bytes on the disk that the sandbox has written outside of its mounts; None when the engine does not tell."""

    def find(self, id: str) -> Found | None:
        """One sandbox as it is now, None when there is none of this executor."""

    def list(self) -> list[Found]:  # last: its name hides the type from what follows
        """Every sandbox of this executor, whatever its state. What it says of one is old once others were looked at."""
