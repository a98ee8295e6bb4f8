"""The pydantic models of everything that comes from outside, and the words of the errors about it.

Owns which fields there are and of what type; the grammar of each value is `grammar`'s. Requests refuse fields that they
do not know: a field that somebody believes in and nobody reads (a uid, a device) is worse than an error. Reports of
executors ignore them, so that an executor may be newer than its server. Must not know accounts or permissions.
"""

from __future__ import annotations

import re
from datetime import UTC
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, Field, PlainValidator, ValidationError
from pydantic.alias_generators import to_camel

from . import grammar, model
from .errors import Error

FLAGS = {  # what people type for a field: their errors should speak of that
    "name": "--name", "workspace": "--workspace", "node": "--node", "cluster": "--cluster", "workDir": "--workdir",
    "requests.gpuCount": "--gpus", "requests.cpuCount": "--cpus", "requests.memory": "--memory",
    "requests.sharedMemory": "--shared-memory", "image.docker": "--image", "image.beaker": "--image", "pull": "--pull",
    "priority": "--priority", "timeout": "--timeout", "hostname": "--hostname", "saveImage": "--save-image",
    "ports": "--port", "envVars.name": "--env", "envVars.value": "--env", "envVars.secret": "--secret-env",
    "datasets.mountPath": "--secret-mount", "datasets.source.secret": "--secret-mount", "datasets": "--mount",
}  # fmt: skip
SUGGESTIONS = {
    "--memory": "for example --memory 6.5GiB", "--shared-memory": "for example --shared-memory 1GiB",
    "--gpus": "for example --gpus 1", "--cpus": "for example --cpus 7.5", "--timeout": "for example --timeout 8h",
    "--port": "for example --port 8000",
    "--image": "for example --image debian:12", "--name": "for example --name train-2",
}  # fmt: skip

T = TypeVar("T", bound=pydantic.BaseModel)


def _absent(value: Any) -> Any:
    if value:
        raise ValueError("not supported yet")
    return None


def _beaker_image(value: Any) -> str:
    return grammar.image(value if isinstance(value, str) and value.startswith("beaker://") else f"beaker://{value}")


Text = Annotated[str, PlainValidator(grammar.text, json_schema_input_type=str)]
Line = Annotated[str, PlainValidator(grammar.line, json_schema_input_type=str)]
Name = Annotated[str, PlainValidator(grammar.name, json_schema_input_type=str)]
Reference = Annotated[str, PlainValidator(grammar.reference, json_schema_input_type=str)]
EnvName = Annotated[str, PlainValidator(grammar.env_name, json_schema_input_type=str)]
Hostname = Annotated[str, PlainValidator(grammar.hostname, json_schema_input_type=str)]
DockerImage = Annotated[str, PlainValidator(grammar.image, json_schema_input_type=str)]
BeakerImage = Annotated[str, PlainValidator(_beaker_image, json_schema_input_type=str)]
Path = Annotated[str, PlainValidator(grammar.path, json_schema_input_type=str)]
Count = Annotated[int, PlainValidator(grammar.count, json_schema_input_type=int)]
Cores = Annotated[float, PlainValidator(grammar.cores, json_schema_input_type=float)]
Size = Annotated[int, PlainValidator(grammar.parse_size, json_schema_input_type=str | int)]
Duration = Annotated[float, PlainValidator(grammar.parse_duration, json_schema_input_type=str | int)]
Port = Annotated[tuple[int, int], PlainValidator(grammar.port, json_schema_input_type=str | int)]
Absent = Annotated[None, PlainValidator(_absent, json_schema_input_type=Any)]
Ulid = Annotated[str, Field(pattern=r"^[0-7][0-9A-HJKMNP-TV-Z]{25}$")]
Time = Annotated[pydantic.AwareDatetime, Field(strict=False), AfterValidator(lambda moment: moment.astimezone(UTC))]
Dimension = Annotated[int, Field(ge=0, lt=65536)]


class Body(pydantic.BaseModel):
    """What somebody sends: unknown fields are refused."""

    model_config = pydantic.ConfigDict(
        alias_generator=to_camel, validate_by_name=False, extra="forbid", strict=True, ser_json_inf_nan="null"
    )


class Report(Body):
    """What an executor of another version may send: unknown fields are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore")


class Requests(Body):
    gpu_count: Count | None = None
    cpu_count: Cores | None = None
    memory: Size | None = None
    shared_memory: Size | None = None


class EnvVar(Body):
    name: EnvName
    value: Text | None = None
    secret: Name | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> EnvVar:
        if self.value is not None and self.secret is not None:
            raise ValueError("give either value or secret, not both")
        return self


class Source(Body):
    secret: Name
    host_path: Absent = None
    beaker: Absent = None


class Dataset(Body):
    mount_path: Path
    source: Source


class Image(Body):
    docker: DockerImage | None = None
    beaker: BeakerImage | None = None

    @pydantic.model_validator(mode="after")
    def _one(self) -> Image:
        if self.docker and self.beaker:
            raise ValueError("give either docker or beaker, not both")
        return self


class SessionBody(Body):
    """The `session` object of `POST /jobs`."""

    workspace: Reference | None = None
    name: Name | None = None
    node: Hostname | None = None
    cluster: Reference | None = None
    requests: Requests | None = None
    command: Annotated[list[Text], Field(max_length=4096)] | None = None
    env_vars: Annotated[list[EnvVar], Field(max_length=1024)] | None = None
    datasets: Annotated[list[Dataset], Field(max_length=256)] | None = None
    image: Image | None = None
    save_image: Absent = None
    ports: Annotated[list[Port], Field(max_length=100)] | None = None
    work_dir: Path | None = None
    priority: Literal["low", "normal", "high", "urgent"] | None = None
    timeout: Duration | None = None
    hostname: Hostname | None = None
    bare: bool | None = None
    host_networking: bool | None = None
    pull: Literal["always", "missing", "never"] | None = None

    @pydantic.field_validator("ports")
    @classmethod
    def _each_once(cls, ports: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
        inside, outside = [own for own, _ in ports or ()], [node for _, node in ports or () if node]
        if twice := next((port for ports in (inside, outside) for port in ports if ports.count(port) > 1), 0):
            raise ValueError(f"{twice} is given twice")
        return ports

    @pydantic.model_validator(mode="after")
    def _ports_of_its_own(self) -> SessionBody:
        if self.ports and self.host_networking:
            raise ValueError("--port: with --host-networking the session's ports are the node's; leave out one of them")
        return self

    def request(self, *, tty: bool, stdin: bool, size: tuple[int, int]) -> model.Request:
        wanted, image = self.requests or Requests(), self.image or Image()
        return model.Request(
            name=self.name,
            workspace=self.workspace,
            image=image.docker or image.beaker,
            pull=model.Pull(self.pull or "missing"),
            command=tuple(self.command or ()),
            env=tuple((pair.name, pair.value or "") for pair in self.env_vars or () if pair.secret is None),
            secret_env=tuple((pair.name, pair.secret) for pair in self.env_vars or () if pair.secret is not None),
            secret_mounts=tuple((each.source.secret, each.mount_path) for each in self.datasets or ()),
            gpus=wanted.gpu_count,
            cpus=wanted.cpu_count,
            memory=wanted.memory,
            shared_memory=wanted.shared_memory,
            workdir=self.work_dir,
            hostname=self.hostname,
            bare=bool(self.bare),
            host_network=bool(self.host_networking),
            ports=tuple(self.ports or ()),
            timeout=self.timeout,
            priority=self.priority or "normal",
            tty=tty,
            stdin=stdin,
            size=size,
        )


class AccountBody(Body):
    name: Name
    display_name: Line | None = None
    email: Line | None = None
    institution: Line | None = None
    role: Literal["user", "admin"] = "user"


class TokenBody(Body):
    """expiry: how long it lives. scope: never more than the caller may. account: whose, for administrators.

    session: for the scope session, the id of the session that it lives as long as. hostname: for the scope executor,
    the machine that it is for, which it may take over where that is known; else it is for the first that it registers.
    """

    account: Name | None = None
    name: Line = ""
    scope: Literal["user", "executor", "admin", "session"] = "user"
    session: Ulid | None = None
    hostname: Hostname | None = None
    expiry: Duration | None = None


class WorkspaceBody(Body):
    """org: its owner, where that is not part of the name."""

    name: Reference
    org: Name | None = None


class SecretBody(Body):
    name: Name


class WorkspacePatch(Body):
    archive: bool | None = None


class Limits(Report):
    """What a node has, or has free."""

    cpu_count: Cores | None = None
    memory: Size | None = None
    gpu_count: Count | None = None
    gpu_type: Line | None = None
    gpu_ids: list[Line] | None = None

    def resources(self) -> model.Resources:
        return model.Resources(self.gpu_count or len(self.gpu_ids or ()), self.cpu_count or 0.0, self.memory or 0)

    def as_json(self) -> dict[str, Any]:
        memory = None if self.memory is None else grammar.exact_size(self.memory)
        return self.model_dump(by_alias=True, exclude_none=True) | ({"memory": memory} if memory else {})


class ClusterBody(Body):
    name: Name
    capacity: Count = 0
    preemptible: bool = False
    spec: Limits | None = None


class ClusterPatch(Body):
    capacity: Count | None = None


class NodeBody(Body):
    hostname: Hostname
    limits: Limits
    instance: Ulid | None = None


class NodePatch(Body):
    cordoned: bool | None = None
    cordon_reason: Line | None = None
    ttl: Duration | None = None
    hostname: Hostname | None = None
    limits: Limits | None = None


Amount = Annotated[float, Field(ge=0, lt=1e18, strict=False)]


class Usage(Report):
    """cpu: cores. memory, disk: bytes. What is not known is absent."""

    cpu: Amount | None = None
    memory: Amount | None = None
    disk: Amount | None = None


class GpuUsage(Report):
    """use: percent of the time. memory, total: bytes."""

    use: Annotated[float, Field(ge=0, le=100, strict=False)] | None = None
    memory: Amount | None = None
    total: Amount | None = None


class Sample(Report):
    """What a node, its GPUs by CDI name, and its sessions by id used at a moment."""

    at: Time
    node: Usage = Usage()
    gpus: Annotated[dict[Line, GpuUsage], Field(max_length=256)] = {}
    sessions: Annotated[dict[Ulid, Usage], Field(max_length=4096)] = {}


class Heartbeat(Report):
    """instance: the executor's start. free: what could be claimed now. queue: how many sessions wait. drained: why the
    node itself starts nothing new.

    samples: those that the server does not have, the oldest first. vouched: hashes of tokens that the node would let in
    while the server is away.
    """

    instance: Ulid
    version: Line = ""
    free: Limits = Limits()
    queue: Count = 0
    drained: Text = ""
    samples: Annotated[list[Sample], Field(max_length=360)] = []
    vouched: Annotated[list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], Field(max_length=1000)] = []


class JobStatusPatch(Body):
    canceled: bool | None = None
    canceled_for: Line | None = None


class JobPatch(Body):
    status: JobStatusPatch | None = None
    limits: Absent = None
    priority: Absent = None


class Door(Body):
    tty: bool = True
    stdin: bool = True
    size: Annotated[tuple[Dimension, Dimension], Field(strict=False)] = (24, 80)


class JobBody(Body):
    session: SessionBody


class ClaimReport(Report):
    gpus: list[Line] = []
    cpu_count: Cores = 0.0
    memory: Size = 0


class StatusReport(Report):
    created: Time | None = None
    scheduled: Time | None = None
    image_ready: Time | None = None
    made: Time | None = None
    started: Time | None = None
    exited: Time | None = None
    finalized: Time | None = None
    canceled: Time | None = None
    canceled_for: Text = ""
    exit_code: Annotated[int, Field(ge=0, le=255)] | None = None
    message: Text = ""
    error: Line = ""


class AuthorReport(Report):
    name: Line


class JobReport(Report):
    id: Ulid
    author: AuthorReport
    node: Text = ""
    limits: ClaimReport | None = None
    status: StatusReport
    port_mappings: dict[Count, Annotated[int, Field(gt=0, lt=65536)]] = {}
    session: dict[str, Any] = {}
    revision: Annotated[int, Field(ge=0, lt=1 << 63)]


def check(kind: type[T], data: Any) -> T:
    """The object that `data` describes. Raises Error invalid with one line that names the first wrong field."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise invalid(error.errors(), of_session=kind is SessionBody) from None


def invalid(errors: Any, at: int = 0, of_session: bool = False) -> Error:
    """The Error for pydantic's list of errors; `at` leading parts of each location are not shown.

    of_session: they are about a `SessionBody` itself, whose fields people know as flags.
    """
    first = errors[0]
    where = ".".join(str(part) for part in first["loc"][at:] if not str(part).startswith("function-"))
    field = where.removeprefix("session.")
    flag = FLAGS.get(re.sub(r"\.[0-9]+", "", field), where) if of_session or field != where else where
    flag = flag or "the request"
    if first["type"] == "extra_forbidden":
        return Error("invalid", f"{flag}: not a field of this request", "remove it: nothing would read it")
    if first["type"] == "missing":
        return Error("invalid", f"{flag}: missing", "add this field")
    value = first["input"] if isinstance(first["input"], (str, int, float, type(None))) else ...
    if first["type"] in ("model_type", "dict_type"):
        return Error("invalid", f"{flag}: not a JSON object", "send an object")
    reason = str(first.get("ctx", {}).get("error") or first["msg"])
    if first["type"] != "value_error" and value is not ...:
        reason = f"{value!r}: {reason[:1].lower()}{reason[1:]}"
    return Error("invalid", f"{flag}: {reason}", SUGGESTIONS.get(flag, "correct it and try again"))
