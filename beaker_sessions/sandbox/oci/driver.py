"""The driver that starts OCI containers itself: no daemon, a user namespace for each session.

Owns: the order in which a sandbox is made and unmade, and its directory. Must not decide policy, nor keep anything in
memory that a new instance could not find again: `sandbox.json` is written before anything else is made, so that what
was interrupted at any point is found and removed by the next instance. A little longer than 400 lines: it is the whole
interface, each method a few lines that call the modules beside it.

    STATE/sessions/ID/   sandbox.json config.json upper/ log exit … (the bundle of one sandbox), exec/HANDLE/
    STATE/images/        containers-storage, and descriptions of images; may be elsewhere
    STATE/runtime/       the runtime's own state
    STATE/inside/        what every sandbox sees as /.beaker
    STATE/trash/         what is being removed
    RUN/BRIDGE/networks/ network namespaces
    RUN/BRIDGE/roots/    where a root file system is mounted while its container is made, each in a mount namespace
                         of its own; for everybody else it is empty
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import resource
import secrets
import shutil
import signal as signals
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...errors import Error
from ...model import Identity, Pull
from .. import (
    LABEL,
    LABEL_OWNER,
    Finding,
    Found,
    Framing,
    Image,
    Limits,
    Login,
    Progress,
    Spec,
    Status,
    Terminal,
    cdi,
    delegated,
    resolvers,
    subordinate,
)
from ..busybox import BUSYBOX
from . import apparmor, cgroups, config, conmon, keyring, layer, logs, mounts, programs, record, rootfs, userns
from .check import check
from .idmaps import IdMaps
from .images import Images
from .mounts import IdMap
from .network import Network
from .processes import Process, mentioning
from .record import Record
from .remains import GONE, Remains
from .watch import Watch

RUN = Path("/run/beaker/oci")  # every id may pass through it, which the state need not allow
PARTS = ("sessions", "runtime", "inside", "trash")
READY = 1.0  # seconds in which a sandbox's init must listen to signals
FULL = (errno.ENOSPC, errno.EDQUOT)
LEAST = 1 << 20  # bytes without which nothing starts

log = logging.getLogger(__name__)


class OciSandboxes:
    """`Sandboxes` by an OCI runtime under conmon.

    state: a directory of the driver's own, on a file system that overlays can be on. owner: labels its sandboxes.
    cdi_paths: directories of CDI specs; cdi_hooks: programs that they may run. docker: the socket of a Docker Engine
    whose images may be used, "" for none.
    bridge: the network bridge of this executor's sessions. etc: the directory of `subuid` and `subgid`. images: where
    images are, on any disk, by default below state; limits and realms: as of `Images`. access: what sessions may reach
    of this machine, see `sandbox.firewall`. ids: the first id of those from which new ranges are taken, and the one
    after the last.
    """

    name = "oci"
    root = True

    def __init__(
        self, state: Path, owner: str, cdi_paths: Iterable[str | os.PathLike[str]] = (), *,
        docker: str = "", bridge: str = "beaker0", etc: Path = subordinate.ETC, access: Iterable[str] = (),
        cdi_hooks: Iterable[str] = (), images: Path | None = None,
        limits: Limits | None = None, realms: Mapping[str, str] | None = None,
        ids: tuple[int, int] = (userns.FIRST, userns.LAST),
    ) -> None:  # fmt: skip
        keyring.join()  # with all threads and programs to come
        self.state, self.owner, self.etc = state, owner, etc
        self.cdi_paths, self.cdi_hooks = list(cdi_paths), list(cdi_hooks)
        self.ids, self.maps = ids, IdMaps()
        self.cgroups = cgroups.detect()
        self.cgroup = delegated.base() + "/beaker-" + re.sub(r"[^a-z0-9]+", "-", owner.lower()).strip("-")
        self.roots = RUN / bridge / "roots"
        for path in (RUN.parent, RUN, RUN / bridge):
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(path.stat().st_mode | 0o111)
        for path in (self.roots, state, *(state / name for name in PARTS)):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.chmod(0o700)  # earlier versions let everybody pass
        (state / "inside").chmod(0o755)  # every sandbox has it as it is
        self.images = Images(images or state / "images", docker, limits, realms)
        self.network = Network(RUN / bridge / "networks", bridge, access)
        self.runtime = conmon.Runtime(programs.find(programs.RUNTIMES), state / "runtime")
        programs.sealed(self.runtime.path)  # lest the first session wait for it
        self.quotas = layer.has_quotas(state)
        self._namespaces: dict[tuple[object, ...], int] = {}
        self._watches: list[Watch] = []
        programs.install(state / "inside")
        self.pids = cgroups.room()
        if not self.cgroups.limit_pids(self.cgroup, self.pids):
            self.pids = 0
        if apparmor.enabled() and (why := apparmor.load()):
            log.warning("sessions have no AppArmor profile: %s", why)
        self.records = record.Records(self.cgroups, self.cgroup, self.network.directory)
        self.remains = Remains(state, self.roots, self.cgroups, self.cgroup, self.network, self.records)
        self.remains.adopt()
        for _, sandbox in self._sandboxes():
            if found := _maps(sandbox):
                self.maps.add(sandbox.id, *found)

    def image(
        self, reference: str, pull: Pull, progress: Callable[[Progress], None], login: Login = lambda _: None,
        going: Callable[[], None] = lambda: None,
    ) -> Image:  # fmt: skip
        return self.images.get(reference, pull, progress, login, going)

    def create(self, spec: Spec) -> None:
        image = self.images.describe(spec.image.id)
        edits = cdi.load(self.cdi_paths, self.cdi_hooks).edits(spec.gpus) if spec.gpus else cdi.Edits()
        nodes = [_node(node) for node in edits.nodes]
        uids, gids = userns.maps(
            spec.identity, userns.subordinate(spec.identity, self.etc, *self.ids), edits.gids
        )  # fmt: skip
        directory = self._directory(spec.id)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError as error:
            raise Error("conflict", f"the sandbox {spec.id} exists already") from error
        except OSError as error:
            raise self._full(error) or Error("internal", f"the sandbox {spec.id} could not be made: {error}") from error
        try:
            self.maps.take(spec.id, uids, gids)
            labels = {**spec.labels, LABEL: spec.id, LABEL_OWNER: self.owner}
            sandbox = Record(
                spec.id, labels, spec.tty, f"{self.cgroup}/{spec.id}", boot=record.boot(), runtime=self.runtime.path
            )
            network = None if spec.host_network else self.network.take()
            if network:
                sandbox = replace(sandbox, network=network.name)
            if self.quotas:
                sandbox = replace(sandbox, project=layer.project({other.project for _, other in self._sandboxes()}))
            sandbox.save(directory)
            for part in layer.PARTS:
                (directory / part).mkdir()
            if sandbox.project:
                layer.assign(directory, sandbox.project, spec.disk)
            host = config.Host(
                self.roots, sandbox.cgroup, uids, gids, self.cgroups.unified, self.cgroups.swap,
                resource.getrlimit(resource.RLIMIT_NOFILE)[1], apparmor.profile(),
            )  # fmt: skip
            bundle = config.config(spec, host, edits, nodes)
            (directory / "config.json").write_text(json.dumps(bundle | {"annotations": labels}))  # see `record`
            root = rootfs.make(
                spec, self.roots, directory, image, uids, gids, self._namespace(uids, gids),
                inside=self.state / "inside", resolvers=resolvers.text(), devices=config.beforehand(edits),
            )  # fmt: skip
            with mounts.opened(root):
                holder, init = conmon.create(
                    self.runtime, spec.id, directory, root, network, tty=spec.tty, stdin=spec.stdin
                )
            logs.begin(directory)
            if not spec.tty:
                user = spec.identity
                conmon.give(holder, userns.outside(uids, user.uid), userns.outside(gids, user.gid))
            replace(sandbox, conmon=Process.of(holder), init=Process.of(init)).save(directory)
            self._tell(spec.id)
        except BaseException as error:
            full = self._full(error)
            self.remains.remove(spec.id)
            self.maps.drop(spec.id)
            if full:
                raise full from error
            if isinstance(error, OSError):
                raise Error("internal", f"the sandbox {spec.id} could not be made: {error}") from error
            raise

    def attach(self, id: str, *, replay: bool, whole: bool = False) -> Terminal:
        directory = self._directory(id)
        sandbox = self._record(id)
        framed = whole and not sandbox.tty
        try:
            if replay:
                connection, text = logs.join(directory, sandbox.conmon, whole=whole, framed=framed)
                return Terminal(connection.detach(), Framing.CONMON, text)
            return Terminal(conmon.connect(directory).detach(), Framing.CONMON)
        except (ConnectionRefusedError, FileNotFoundError):
            text = logs.recent(directory, whole=whole, framed=framed) if replay else b""
            return Terminal(conmon.ended().detach(), Framing.CONMON, text)

    def start(self, id: str, size: tuple[int, int] | None) -> None:
        directory, sandbox = self._directory(id), self._record(id)
        if not conmon.waiting(self.runtime, id, sandbox.init):
            return
        if size:
            # Through the sandbox's own end, because conmon would do it at some later moment.
            with contextlib.suppress(OSError):
                fd = os.open(f"/proc/{sandbox.init.pid}/fd/0", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
                with mounts.opened(fd):
                    conmon.set_size(fd, size)
        (directory / "started").touch()
        conmon.start(self._runtime(sandbox), id, directory, sandbox.init)
        self._tell(id)

    def resize(self, id: str, size: tuple[int, int], process: str = "") -> None:
        conmon.resize(self._holder(id, process) if process else self._record(id).conmon, size)

    def exec(
        self, id: str, command: tuple[str, ...], *, env: Mapping[str, str], identity: Identity, workdir: str,
        size: tuple[int, int] | None, stdin: bool,
    ) -> tuple[str, Terminal]:  # fmt: skip
        directory, sandbox = self._directory(id), self._record(id)
        if self._found(directory, sandbox).status is not Status.RUNNING:
            raise Error("conflict", f"{id} does not run")
        maps = _maps(sandbox)
        if not maps:
            raise Error("conflict", f"{id} does not run")
        uids, gids = maps
        main: Any = record.configuration(directory).get("process")
        try:
            variables, files, apparmor = main["env"], main["rlimits"][0]["hard"], main.get("apparmorProfile", "")
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            what = f"{directory / 'config.json'} is damaged, so nothing more can be started in {id}, which runs on"
            raise Error("unavailable", what, "save what you need, stop it, and create another") from error
        groups = {gid for gid in identity.groups if userns.mapped(gids, gid)}
        handle = secrets.token_hex(8)
        process = config.process(
            config.entry(workdir, command), config.environment(variables, env), identity, tty=size is not None,
            gids=groups, files=files, size=size, apparmor=apparmor,
        )  # fmt: skip
        own = directory / "exec" / handle
        try:
            own.mkdir(parents=True)
            (own / "process.json").write_text(json.dumps(process))
            holder, connection = conmon.execute(
                self._runtime(sandbox), id, own, self._network(sandbox), tty=size is not None, stdin=stdin,
                owner=(userns.outside(uids, identity.uid), userns.outside(gids, identity.gid)),
            )  # fmt: skip
            (own / "started").write_text(json.dumps(Process.of(holder).__dict__))
        except BaseException as error:
            for started in mentioning(own):  # nobody would know of it
                started.kill()
            if full := self._full(error):
                shutil.rmtree(own, ignore_errors=True)
                raise full from error
            raise
        return handle, Terminal(connection.detach(), Framing.CONMON)

    def exec_running(self, id: str, handle: str) -> bool:
        return self._holder(id, handle).alive()

    def execs(self, id: str) -> list[str]:
        self._record(id)
        own = self._directory(id) / "exec"
        handles = [path.name for path in own.iterdir()] if own.exists() else []
        return [handle for handle in handles if self.exec_running(id, handle)]

    def exec_exit(self, id: str, handle: str) -> int:
        self._holder(id, handle).wait(GONE)
        try:
            return int((self._process(id, handle) / "exit").read_text())
        except FileNotFoundError as error:
            raise Error("internal", f"the exit code of {handle} in {id} is lost: its conmon was killed") from error

    def signal(self, id: str, signal: int) -> None:
        self._record(id).init.kill(signal)

    def init(self, id: str) -> int | None:
        return self._record(id).init.open()

    def stop(self, id: str, grace: float) -> None:
        sandbox = self._record(id)
        if not conmon.waiting(self.runtime, id, sandbox.init):
            number = signals.SIGHUP if sandbox.tty else signals.SIGTERM
            sandbox.init.heeds(number, "init", READY)  # what a namespace's first has no handler for is lost
            sandbox.init.kill(number)
            if sandbox.conmon.wait(grace):
                return
        self.remains.kill(sandbox, self._directory(id))

    def remove(self, id: str) -> None:
        self._directory(id)
        self.remains.remove(id)
        self.maps.drop(id)

    def watch(self) -> Iterator[str]:
        watch = Watch(self._sandboxes)
        self._watches.append(watch)
        try:
            with self.network.followed():
                yield ""
                yield from watch
        finally:
            self._watches.remove(watch)
            watch.close()

    def logs(self, id: str, limit: int, *, framed: bool = False) -> bytes:
        self._record(id)
        return logs.tail(self._directory(id), limit, framed=framed)

    def disk(self, id: str) -> int | None:
        sandbox = self._record(id)
        try:
            return layer.use(self._directory(id), sandbox.project)
        except OSError as error:
            raise Error("unavailable", f"the disk use of {id} is not known: {error}") from error

    def guard(self) -> None:
        self.network.guard()

    def weigh(self, cpus: float) -> None:
        if "cpu" not in self.cgroups.controllers():
            return  # as doctor says
        top = self.cgroup.split("/")[1]
        machine = os.cpu_count() or 1
        found = self.cgroups.weights().items()
        kind = ".slice" if delegated.base() else ""  # systemd's mounts are groups too, where nothing runs
        others = sum(weight for name, weight in found if name != top and name.endswith(kind))
        if delegated.base():
            weight = cgroups.guarantee(cpus, machine, others)
            delegated.weigh(weight)
            self.cgroups.weigh(self.cgroup, cgroups.MOST)  # beside what holds terminals
        else:  # beside processes in no group, of which as many as there are CPUs are taken to be busy
            self.cgroups.weigh(self.cgroup, cgroups.guarantee(cpus, machine, others + 100 * machine))

    def check(self) -> list[Finding]:
        init = programs.find(programs.INITS)
        if self.pids:
            pids = Finding("ok", f"sessions together have at most {self.pids} processes, which leaves the machine some")
        else:
            pids = Finding("warning", "sessions together can take all ids of processes", "enable the pids controller")
        found = check(
            self.state, self.state / "trash", self.runtime.path, self.cgroups, init, BUSYBOX, self.images.root,
            self.ids,
        )  # fmt: skip
        return [*found, *self.network.check(), pids]

    def close(self) -> None:
        """Give back what is kept ready for the next sandboxes: for tests, and when the executor is uninstalled."""
        self.remains.close()
        while self._namespaces:
            os.close(self._namespaces.popitem()[1])

    def _full(self, error: BaseException) -> Error | None:
        """What to say when it was the disk: what conmon and the runtime cannot write makes them end without a word."""
        disk = os.statvfs(self.state)
        if not (isinstance(error, OSError) and error.errno in FULL) and (
            not isinstance(error, Error) or error.code != "internal" or disk.f_bfree * disk.f_frsize > LEAST
        ):
            return None
        hint = "stop sessions that you do not need, or ask the administrator: beaker executor images prune"
        return Error("storage_full", f"the disk of {self.state} is full", hint)

    def _directory(self, id: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", id):
            raise Error("invalid", f"{id!r} is no session id")
        return self.state / "sessions" / id

    def _holder(self, id: str, handle: str) -> Process:
        """The conmon of an exec."""
        own = self._process(id, handle)
        try:
            return Process(**json.loads((own / "started").read_text()))
        except (OSError, ValueError, TypeError):  # its executor was killed before that was written, or it is damaged
            return next(iter(mentioning(own)), Process(0, 0))

    def _process(self, id: str, handle: str) -> Path:
        """The directory of an exec."""
        own = self._directory(id) / "exec" / handle
        if not re.fullmatch(r"[0-9a-f]{16}", handle) or not own.is_dir():
            raise Error("not_found", f"{handle!r} is no process of {id}")
        return own

    def _sandboxes(self) -> Iterator[tuple[Path, Record]]:
        """All that have been made, with their directories."""
        for directory in (self.state / "sessions").iterdir():
            sandbox = self.records.load(directory)
            if sandbox and sandbox.made:
                yield directory, sandbox

    def _found(self, directory: Path, sandbox: Record) -> Found:
        if not sandbox.conmon.alive():
            sandbox.init.kill()  # its conmon was killed: nobody holds its streams and its exit code
        waiting = conmon.waiting(self.runtime, sandbox.id, sandbox.init)
        found = sandbox.found(directory, waiting=waiting, oom=self.cgroups.oom(sandbox.cgroup))
        if found.status is Status.EXITED and not conmon.begun(self.runtime, sandbox.id):
            return replace(found, started=None)  # its executor was killed at the moment of the start
        return found

    def _network(self, sandbox: Record) -> Path | None:
        return self.network.directory / sandbox.network if sandbox.network else None

    def _runtime(self, sandbox: Record) -> conmon.Runtime:
        """The one that made it: another may have been installed since."""
        return replace(self.runtime, path=sandbox.runtime or self.runtime.path)

    def _tell(self, id: str) -> None:
        for watch in self._watches:
            watch.tell(id)

    def _record(self, id: str) -> Record:
        sandbox = self.records.load(self._directory(id))
        if not sandbox or not sandbox.made:
            raise Error("not_found", f"there is no sandbox {id}")
        return sandbox

    def _namespace(self, uids: IdMap, gids: IdMap) -> int:
        """A user namespace for idmapped mounts, one for each map."""
        key = (*uids, None, *gids)
        if key not in self._namespaces:
            self._namespaces[key] = mounts.user_namespace(uids, gids)
        return self._namespaces[key]

    def find(self, id: str) -> Found | None:
        directory = self._directory(id)
        sandbox = self.records.load(directory)
        return self._found(directory, sandbox) if sandbox and sandbox.made else None

    def list(self) -> list[Found]:  # last: its name hides the type from what follows
        return [self._found(directory, sandbox) for directory, sandbox in self._sandboxes()]


def _maps(sandbox: Record) -> tuple[IdMap, IdMap] | None:
    """The id maps that a sandbox has, as the kernel tells; None when it has ended. Source: user_namespaces(7)."""
    found = []
    for kind in ("uid_map", "gid_map"):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{sandbox.init.pid}/{kind}").read_text().splitlines()
            found.append([(int(one), int(two), int(three)) for one, two, three in map(str.split, lines)])
    return (found[0], found[1]) if len(found) == 2 and sandbox.init.alive() else None


def _node(node: cdi.DeviceNode) -> config.Node:
    try:
        found = os.stat(node.host_path)
    except OSError as error:
        raise Error("unavailable", f"{node.host_path}: {error.strerror}", "beaker executor doctor") from error
    return config.Node(
        node.host_path, node.path, "b" if stat.S_ISBLK(found.st_mode) else "c",
        os.major(found.st_rdev), os.minor(found.st_rdev), node.permissions,
    )  # fmt: skip
