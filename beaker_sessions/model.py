"""The nouns of the system and the legal moves of a session's state. No input or output, no validation of outside data.

Sizes are bytes, times are `datetime` in UTC, CPUs are (fractional) logical cores, ids are ULIDs unless said otherwise.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from datetime import datetime


class State(enum.StrEnum):
    """Where a session is in its life. The names are those of the `status` timestamps in the REST API."""

    CREATED = "created"  # acknowledged, waiting in a node's queue
    SCHEDULED = "scheduled"  # resources claimed, the container is being made
    STARTED = "started"  # the main process runs
    EXITED = "exited"  # the main process ended; clean-up is under way
    FINALIZED = "finalized"  # nothing is left on the node; never changes again


MOVES: dict[State, frozenset[State]] = {
    State.CREATED: frozenset({State.SCHEDULED, State.FINALIZED}),
    State.SCHEDULED: frozenset({State.STARTED, State.EXITED}),
    State.STARTED: frozenset({State.EXITED}),
    State.EXITED: frozenset({State.FINALIZED}),
    State.FINALIZED: frozenset(),
}
LIVE = frozenset({State.SCHEDULED, State.STARTED, State.EXITED})  # the states that hold a claim


class Pull(enum.StrEnum):
    """When an image is fetched from its registry."""

    ALWAYS = "always"
    MISSING = "missing"
    NEVER = "never"


class Scope(enum.StrEnum):
    """What a token may do: act as its account, act as a node's executor, administer, or what a session may inside."""

    USER = "user"
    EXECUTOR = "executor"
    ADMIN = "admin"
    SESSION = "session"


@dataclass(frozen=True)
class Resources:
    """An amount of a machine. `gpus` is a count of whole GPUs."""

    gpus: int = 0
    cpus: float = 0.0
    memory: int = 0

    def __add__(self, other: Resources) -> Resources:
        return Resources(self.gpus + other.gpus, self.cpus + other.cpus, self.memory + other.memory)

    def __sub__(self, other: Resources) -> Resources:
        return Resources(self.gpus - other.gpus, self.cpus - other.cpus, self.memory - other.memory)

    def fits(self, inside: Resources) -> bool:
        """Whether this amount is available in `inside`; CPUs are compared to a thousandth of a core."""
        return self.gpus <= inside.gpus and self.cpus <= inside.cpus + 1e-3 and self.memory <= inside.memory


@dataclass(frozen=True)
class Gpu:
    """One claimable GPU: `id` is its qualified CDI name such as `nvidia.com/gpu=0`, `memory` is 0 when unknown."""

    id: str
    type: str
    memory: int = 0


@dataclass(frozen=True)
class Claim:
    """What a live session holds: these GPUs, by CDI name, and at least this much CPU and memory (0: none reserved).

    ports: TCP ports of its own and the node's that lead there, as pairs.
    """

    gpus: tuple[str, ...] = ()
    cpus: float = 0.0
    memory: int = 0
    ports: tuple[tuple[int, int], ...] = ()

    @property
    def amount(self) -> Resources:
        return Resources(len(self.gpus), self.cpus, self.memory)


@dataclass(frozen=True)
class Identity:
    """A Unix user of this machine, as its account database has it. groups: gid to name, primary group included."""

    name: str
    uid: int
    gid: int
    home: str
    groups: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a user asked for. None means "the default", which only the node can know.

    command: empty for an interactive shell. env: pairs in the order given. shared_memory and memory: bytes.
    secret_env: variable and the secret's name; secret_mounts: the secret's name and the path of a file. Values are
    never part of a request. ports: TCP ports to publish, each with the node's port, 0 for any that is free.
    """

    name: str | None = None
    workspace: str | None = None
    image: str | None = None
    pull: Pull = Pull.MISSING
    command: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    secret_env: tuple[tuple[str, str], ...] = ()
    secret_mounts: tuple[tuple[str, str], ...] = ()
    gpus: int | None = None
    cpus: float | None = None
    memory: int | None = None
    shared_memory: int | None = None
    workdir: str | None = None
    hostname: str | None = None
    bare: bool = False
    host_network: bool = False
    ports: tuple[tuple[int, int], ...] = ()
    timeout: float | None = None  # seconds
    priority: str = "normal"
    tty: bool = True
    stdin: bool = True
    size: tuple[int, int] = (24, 80)  # rows, columns: the window when it was created


@dataclass(frozen=True)
class Session:
    """A session as its node's ledger and the server's record know it.

    message: why it ended as it did, or why it waits, for people. error: the code (of `errors.CODES`) of what kept its
    main process from running, "" when nothing did. revision: grows by one with every change; a report with a lower
    one is stale. node: the node's id, or "" before it is known. image_ready, made: when, on the way from scheduled to
    started, its image was there and its sandbox was made.
    """

    id: str
    account: str  # account name
    node: str
    request: Request
    state: State = State.CREATED
    claim: Claim | None = None
    created: datetime | None = None
    scheduled: datetime | None = None
    image_ready: datetime | None = None
    made: datetime | None = None
    started: datetime | None = None
    exited: datetime | None = None
    finalized: datetime | None = None
    canceled: datetime | None = None
    canceled_for: str = ""
    exit_code: int | None = None
    message: str = ""
    error: str = ""
    revision: int = 0
