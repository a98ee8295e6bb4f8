"""The driver for Docker Engine.

Owns: containers named and labelled for sessions, and the translation between `Sandboxes` and the Engine API. Must not
decide policy, nor keep anything in memory that a new instance could not find again.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import Error
from ...model import Identity, Pull
from .. import LABEL, LABEL_OWNER, Finding, Found, Framing, Image, Limits, Login, Progress, Spec, Status, Terminal, cdi
from .. import framed as frame
from .. import identity as accounts
from . import config, images
from .check import check
from .engine import Engine
from .files import Files
from .network import Network
from .replay import LIMIT, Frame, delivered, frames, join, recent

STATUSES = {
    "created": Status.CREATED,
    "running": Status.RUNNING,
    "paused": Status.RUNNING,
    "restarting": Status.RUNNING,
}
SIZING = 600.0  # seconds in which the engine adds up the files of a container
EXEC_PATIENCE = 10.0  # seconds between the end of an exec's streams and its exit code
KEPT = 16 << 20  # bytes of output that the engine keeps, or more
LOG_ROUNDS, LOG_PAUSE = 25, 0.02  # how often, and how long apart in seconds, a late log is read again
EVENTS = ["start", "die", "oom", "destroy"]


class DockerSandboxes:
    """`Sandboxes` on a Docker Engine.

    socket: the engine's. state: a directory of the driver's own. owner: labels its containers, so that executors with
    different states can share an engine. cdi_paths: directories of CDI specs. image_size: bytes that an image which is
    pulled may take, 0 for no limit; an image that Docker Engine has is taken as it is. bridge: its name without the
    last letter. access: what sessions may reach of this machine, see `sandbox.firewall`.
    """

    name = "docker"
    root = False

    def __init__(
        self, socket: str, state: Path, owner: str, cdi_paths: Iterable[str | os.PathLike[str]] = (), *,
        cdi_hooks: Iterable[str] = (), image_size: int = Limits.image,
        bridge: str = "beaker0", access: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.engine, self.image_size = Engine(socket), image_size
        self.files = Files(state)
        self.owner = owner
        self.cdi_paths, self.cdi_hooks = list(cdi_paths), list(cdi_hooks)
        self.network = Network(self.engine, owner, f"{bridge}d", access)  # the oci driver's may be there, too

    @cached_property
    def _engine_cdi(self) -> bool:
        return bool(self.engine.call("GET", "/info").get("CDISpecDirs"))

    def image(
        self, reference: str, pull: Pull, progress: Callable[[Progress], None], login: Login = lambda _: None,
        going: Callable[[], None] = lambda: None,
    ) -> Image:  # fmt: skip
        return images.get(self.engine, reference, pull, progress, login, going, self.image_size)

    def create(self, spec: Spec) -> None:
        with self._storage(f"create the session {spec.id}"):
            self._create(spec)

    def _create(self, spec: Spec) -> None:
        edits = (
            cdi.load(self.cdi_paths, self.cdi_hooks).edits(spec.gpus) if spec.gpus and not self._engine_cdi else None
        )
        facts = images.accounts(self.engine, self.files, spec.image.id, self.owner)
        passwd = accounts.passwd(facts.passwd, spec.identity, facts.shell)
        group = accounts.group(facts.group, spec.identity)
        try:
            mounts = self.files.create(spec.id, passwd, group, spec.mounts)
        except FileExistsError as error:
            with _absent_is_fine():
                self._inspect(spec.id)
                raise Error("conflict", f"the sandbox {spec.id} exists already") from error
            self.files.remove(spec.id)
            mounts = self.files.create(spec.id, passwd, group, spec.mounts)
        try:
            if not spec.host_network:
                self.network.ensure()
            body = config.container(spec, self.files.directory(spec.id), mounts, edits, self.network.name)
            body["Labels"][LABEL_OWNER] = self.owner
            targets = [mount["Target"] for mount in body["HostConfig"]["Mounts"]]
            images.check_targets(self.engine, self.files, spec.image.id, self.owner, targets)
            self.engine.call("POST", "/containers/create", {"name": config.name(spec.id)}, body)
        except BaseException:
            self.files.remove(spec.id)
            raise

    def attach(self, id: str, *, replay: bool, whole: bool = False) -> Terminal:
        query = {"stream": 1, "stdin": 1, "stdout": 1, "stderr": 1, "detachKeys": config.DETACH_KEYS}
        sock = self.engine.hijack(f"{_path(id)}/attach", query)
        try:
            container = self._inspect(id)
            framing = Framing.RAW if container["Config"]["Tty"] else Framing.MULTIPLEXED
            if container["State"]["Status"] in ("exited", "dead"):
                # The engine would hold the stream open for a next start, which never comes.
                sock.close()
                sock, other = socket.socketpair()
                other.close()
                limit = KEPT if whole else LIMIT
                recent = self.logs(id, limit, framed=whole and framing is not Framing.RAW) if replay else b""
            elif replay and container["State"]["Status"] != "created":
                recent = self._replay(id, sock, framing is Framing.RAW, whole)
            else:
                recent = b""
            return Terminal(sock.detach(), framing, recent)
        except BaseException:
            sock.close()
            raise

    def start(self, id: str, size: tuple[int, int] | None) -> None:
        with self._storage(f"start the session {id}"):
            if self._inspect(id)["State"]["Status"] == "created":
                self.engine.call("POST", f"{_path(id)}/start")
            if size:
                self.resize(id, size)
            self.files.open_gate(id, config.GATE)
        self.files.release(id)

    def resize(self, id: str, size: tuple[int, int], process: str = "") -> None:
        if process:
            self._exec(id, process)
        path = f"/exec/{process}" if process else _path(id)
        try:
            self.engine.call("POST", f"{path}/resize", {"h": size[0], "w": size[1]})
        except Error:
            running = self._exec(id, process)["Running"] if process else self._inspect(id)["State"]["Running"]
            if running:
                raise

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
        gate = f"{config.GATE}-{secrets.token_hex(8)}" if size else ""
        body = config.process(command, env, identity, workdir, gate, tty=size is not None, stdin=stdin)
        handle: str = self.engine.call("POST", f"{_path(id)}/exec", body=body)["Id"]
        try:
            sock = self.engine.hijack(f"/exec/{handle}/start", body={"Detach": False, "Tty": size is not None})
        except Error as error:
            if error.code != "unavailable":
                raise
            what = f"{error.message}, and had not said whether the command was started: it may have run"
            raise Error(error.code, what, "look with ps in the session before you run it again") from error
        try:
            if size:
                self.resize(id, size, handle)
                self.files.open_gate(id, gate)
        except BaseException:
            sock.close()
            raise
        return handle, Terminal(sock.detach(), Framing.RAW if size else Framing.MULTIPLEXED)

    def exec_running(self, id: str, handle: str) -> bool:
        process = self._exec(id, handle)
        return process["Running"] or process["ExitCode"] is None  # the engine starts it after its answer

    def execs(self, id: str) -> list[str]:
        handles: list[str] = self._inspect(id)["ExecIDs"] or []
        running = []
        for handle in handles:
            with _absent_is_fine():  # it ended, and the engine forgot it
                if self._exec(id, handle)["Running"]:
                    running.append(handle)
        return running

    def exec_exit(self, id: str, handle: str) -> int:
        deadline, pause = time.monotonic() + EXEC_PATIENCE, 0.002
        while (process := self._exec(id, handle))["Running"]:
            if time.monotonic() > deadline:
                raise Error("conflict", f"the process {handle} of {id} runs on without its streams")
            time.sleep(pause)
            pause = min(pause * 2, 0.2)
        gate = process["ProcessConfig"]["arguments"][len(config.ENTRY) - 1]
        if gate:
            self.files.close_gate(id, os.path.basename(gate))
        return int(process["ExitCode"])

    def signal(self, id: str, signal: int) -> None:
        try:
            self.engine.call("POST", f"{_path(id)}/kill", {"signal": signal})
        except Error as error:
            if error.code != "conflict":  # it does not run
                raise

    def init(self, id: str) -> int | None:
        pid = self._inspect(id)["State"]["Pid"]
        if not pid:
            return None
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        if self._inspect(id)["State"]["Pid"] == pid:  # else it had ended, and this may be another's
            return fd
        os.close(fd)
        return None

    def stop(self, id: str, grace: float) -> None:
        seconds = math.ceil(grace)
        self.engine.call("POST", f"{_path(id)}/stop", {"t": seconds}, timeout=seconds + 60)

    def remove(self, id: str) -> None:
        with _absent_is_fine():
            self.engine.call("DELETE", _path(id), {"force": 1, "v": 1})
        with self._storage(f"remove the session {id}"):
            self.files.remove(id)

    def watch(self) -> Iterator[str]:
        filters = {"type": ["container"], "event": EVENTS, "label": [LABEL, f"{LABEL_OWNER}={self.owner}"]}
        with self.network.followed():
            for event in self.engine.stream("GET", "/events", {"filters": filters}, timeout=None):
                yield event["Actor"]["Attributes"].get(LABEL, "") if event else ""

    def logs(self, id: str, limit: int, *, framed: bool = False) -> bytes:
        tty = self._inspect(id)["Config"]["Tty"]
        output = self._tail(id, limit, tty)
        if framed:
            return b"".join(frame(stream, data) for stream, data in output)
        return b"".join(data for _, data in output)[-limit:]

    def disk(self, id: str) -> int | None:
        size = self.engine.call("GET", f"{_path(id)}/json", {"size": "1"}, timeout=SIZING).get("SizeRw")
        return None if size is None else int(size)

    def guard(self) -> None:
        self.network.ensure()

    def weigh(self, cpus: float) -> None:
        pass

    def check(self) -> list[Finding]:
        return [*check(self.engine, cdi.load(self.cdi_paths, self.cdi_hooks)), *self.network.check()]

    def close(self) -> None:
        """Give back what is there for all sandboxes: for tests, and when the executor is uninstalled."""
        self.network.remove()

    def _inspect(self, id: str) -> Any:
        return self.engine.call("GET", f"{_path(id)}/json")

    def _exec(self, id: str, handle: str) -> Any:
        """An exec's state. Raises Error not_found when it is of another container, or no handle at all."""
        if re.fullmatch(r"[0-9a-f]{64}", handle):
            process = self.engine.call("GET", f"/exec/{handle}/json")
            if process["ContainerID"] == self._inspect(id)["Id"]:
                return process
        raise Error("not_found", f"the session {id} has no process {handle!r}")

    @contextlib.contextmanager
    def _storage(self, what: str) -> Iterator[None]:
        """Tell a full disk from other failures, ours by its errno, the engine's by looking."""
        try:
            yield
        except OSError as error:
            hint = f"see df {self.files.state}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Error("storage_full", f"cannot {what}: the disk of {self.files.state} is full", hint) from error
            raise Error("internal", f"cannot {what}: {error}", hint) from error
        except Error as error:
            if error.code == "internal" and (root := images.full(self.engine)):
                raise Error(
                    "storage_full", f"cannot {what}: {error.message}", f"free space on the disk of {root}"
                ) from error
            raise

    def _tail(self, id: str, limit: int, tty: bool) -> list[Frame]:
        """The last frames of the log, `limit` bytes or more if there are so many; the API can only count lines."""
        result: list[Frame] = []
        for lines in (limit // 128, limit):
            data = self.engine.read(f"{_path(id)}/logs", {"stdout": 1, "stderr": 1, "tail": lines})
            result = [(1, data)] if tty else frames(data)[0]
            if sum(len(data) for _, data in result) >= limit or data.count(b"\n") < lines:
                break
        return result

    def _replay(self, id: str, sock: socket.socket, tty: bool, whole: bool) -> bytes:
        """What precedes the stream's next byte. The engine writes its log a little later than it feeds the stream."""
        limit = KEPT if whole else LIMIT
        arrived: list[Frame] = []
        before, log = None, self._tail(id, limit, tty)
        for _ in range(LOG_ROUNDS):
            arrived += delivered(sock, tty)
            joined, met = join(log, arrived)
            # Where they met, the log is complete; where the stream says too little to tell, it must have come to rest.
            if met and (log == before or any(b"\n" in data for _, data in arrived)):
                break
            time.sleep(LOG_PAUSE)
            before, log = log, self._tail(id, limit, tty)
        if whole and not tty:
            return b"".join(frame(stream, data) for stream, data in joined)
        text = b"".join(data for _, data in joined)
        return text if whole else recent(text)

    def find(self, id: str) -> Found | None:
        with _absent_is_fine():
            container = self._inspect(id)
            return _found(container) if container["Config"]["Labels"].get(LABEL_OWNER) == self.owner else None
        return None

    def list(self) -> list[Found]:  # last: its name hides the type from what follows
        filters = {"label": [f"{LABEL_OWNER}={self.owner}"]}
        found = []
        for item in self.engine.call("GET", "/containers/json", {"all": 1, "filters": filters}):
            with _absent_is_fine():
                if LABEL in item["Labels"]:
                    found.append(_found(self.engine.call("GET", f"/containers/{item['Id']}/json")))
                else:
                    images.forget(self.engine, item)
        return found


def _path(id: str) -> str:
    return f"/containers/{config.name(id)}"


def _found(container: Mapping[str, Any]) -> Found:
    state = container["State"]
    status = STATUSES.get(state["Status"], Status.EXITED)
    started, finished = _time(state["StartedAt"]), _time(state["FinishedAt"])
    if started and finished:
        # The engine notes the start only after it, by when a short command has ended.
        finished = max(started, finished)
    return Found(
        id=container["Config"]["Labels"][LABEL],
        labels=container["Config"]["Labels"],
        status=status,
        pid=state["Pid"] if status is Status.RUNNING else 0,
        exit_code=state["ExitCode"] if status is Status.EXITED else None,
        oom=state["OOMKilled"],
        started=started,
        finished=finished if status is Status.EXITED else None,
    )


def _time(text: str) -> datetime | None:
    """RFC 3339 with nanoseconds; Go's zero time is no time."""
    if text.startswith("0001-"):
        return None
    seconds, _, fraction = text.rstrip("Z").partition(".")
    return datetime.fromisoformat(f"{seconds}.{fraction[:6]:0<6}+00:00")


@contextlib.contextmanager
def _absent_is_fine() -> Iterator[None]:
    try:
        yield
    except Error as error:
        if error.code != "not_found":
            raise
