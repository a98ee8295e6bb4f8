"""A container of one program, started and ended as a session's would be: what shows that they can run on this machine.

Owns nothing that is left afterwards. Needs neither images nor conmon nor a network.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

from ...errors import Error
from ...model import Identity
from .. import Image, Spec, cdi, delegated
from . import apparmor, config, conmon, mounts, rootfs, userns
from .cgroups import Cgroups
from .images import Description
from .layer import PARTS

SECONDS = 30.0  # in which it must have ended
SAYS = "started"


def run(runtime: str, busybox: str, cgroups: Cgroups, state: Path) -> None:
    """state: the directory that it is tried on.

    Raises OSError where a root file system cannot be made, mostly for want of idmapped layers, Error unavailable with
    what the runtime said.
    """
    id = f"trial-{secrets.token_hex(4)}"
    identity = Identity("root", 0, 0, "/", {})
    uids = gids = userns.id_map(userns.FIRST, [])
    spec = Spec(id, {}, Image(id, id), identity, memory=64 << 20, pids=64, tty=False, host_network=True)
    cgroup = f"{delegated.base()}/beaker-{id}"
    base, top = Path(tempfile.mkdtemp(dir=state)), Path(tempfile.mkdtemp(dir="/run"))
    try:
        for part in ("layer", "inside", "runtime", *PARTS):
            (base / part).mkdir()
        shutil.copy(busybox, base / "inside/busybox")
        image = Description(id, [str(base / "layer")], [], 0, "", None, None, None)
        host = config.Host(
            top, cgroup, uids, gids, cgroups.unified, cgroups.swap,
            resource.getrlimit(resource.RLIMIT_NOFILE)[1], apparmor.profile(),
        )  # fmt: skip
        bundle = config.config(spec, host, cdi.Edits(), ())
        bundle["process"]["args"] = [f"{config.INSIDE}/busybox", "echo", SAYS]
        (base / "config.json").write_text(json.dumps(bundle))
        with (
            mounts.opened(mounts.user_namespace(uids, gids)) as namespace,
            mounts.opened(
                rootfs.make(spec, top, base, image, uids, gids, namespace, inside=base / "inside", resolvers="")
            ) as root,
        ):
            enter = [*conmon.ENTER, f"-m/proc/{os.getpid()}/fd/{root}"]
            _run([*enter, runtime, f"--root={base}/runtime"], base, id)
    finally:
        mounts.remove_tree(top)
        mounts.remove_tree(base)
        cgroups.remove(cgroup)


def _run(runtime: list[str], bundle: Path, id: str) -> None:
    try:
        done = subprocess.run(
            [*runtime, "run", "--no-new-keyring", "--bundle", str(bundle), id], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, errors="replace", check=False, timeout=SECONDS,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Error("unavailable", f"{runtime[0]} is not there any more") from error
    except subprocess.TimeoutExpired as error:
        subprocess.run([*runtime, "delete", "--force", id], capture_output=True, check=False)
        raise Error("unavailable", f"it did not end in {SECONDS:.0f} s") from error
    if done.returncode or SAYS not in done.stdout:
        raise Error("unavailable", conmon.complaint(done.stderr))
