"""An executor without containers, server or root, in a process of its own: the real door before `fake` sandboxes.

`python -m tests.node DIRECTORY`: its socket is DIRECTORY/door. Whoever asks is ada, without a home. The pull of the
image `slow` goes on until it is given up. With the image `heavy` a start takes a second. A sandbox of the image
`ending` has always just ended when it is given a size. A session named `stuck` takes the thread that would make it.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import MagicMock

from beaker_sessions.errors import Error
from beaker_sessions.executor import admission, caller
from beaker_sessions.executor.door import Door
from beaker_sessions.executor.inventory import Inventory
from beaker_sessions.executor.ledger import Ledger
from beaker_sessions.executor.lifecycle import Lifecycle
from beaker_sessions.executor.loop import Loop
from beaker_sessions.executor.sessions import Sessions
from beaker_sessions.model import Gpu, Identity, Session
from beaker_sessions.sandbox import Image, Progress, Spec
from beaker_sessions.sandbox.fake import FakeSandboxes
from beaker_sessions.settings import ExecutorSettings

ADA = Identity("ada", 12345, 12345, "/nonexistent")


class Sandboxes(FakeSandboxes):
    ending: ClassVar[set[str]] = set()

    def image(self, reference: str, pull: Any, progress: Callable[[Progress], None], *more: Any, **named: Any) -> Image:
        done = 0
        while reference == "slow":
            progress(Progress(done := done + 1, 1 << 20, (0, 1)))
            time.sleep(0.01)
        if reference in ("heavy", "ending"):
            return Image(reference, reference)
        return super().image(reference, pull, progress, *more, **named)

    def create(self, spec: Spec) -> None:
        if spec.image.id == "heavy":
            time.sleep(1.0)
        if spec.image.id == "ending":
            self.ending.add(spec.id)
        super().create(spec)

    def resize(self, id: str, size: tuple[int, int], process: str = "") -> None:
        if id in self.ending:
            raise Error("not_found", f"there is no sandbox {id}")
        super().resize(id, size, process)


class Books(Sessions):
    def create(self, account: str, identity: Identity, request: Any, *more: Any, **named: Any) -> Session:
        if request.name == "stuck":
            threading.Event().wait()
        return super().create(account, identity, request, *more, **named)


def main(directory: Path) -> None:
    caller.BEAT = 0.3  # the tests wait in shorter times, too
    ledger = Ledger(directory / "ledger.db")
    sessions = Books(ledger, Inventory("node", 8.0, 1 << 36, (Gpu("lab/gpu=0", "made up"),)))
    settings = ExecutorSettings(storage_path=str(directory), default_image="base", mount_paths=[])
    inside, access, loop = MagicMock(), MagicMock(), Loop()
    inside.prepare.return_value = (Path("/run"), [])
    access.check.return_value = {"name": "ada", "role": "user", "scope": "user"}
    admission.caller = lambda *_: ("ada", ADA)
    lifecycle = Lifecycle(sessions, Sandboxes(), settings, inside, owner="test")
    door = Door(loop, str(directory / "door"), lifecycle, access, lambda _: [], lambda: (), dict)
    loop.start()
    door.listen()
    lifecycle.run()
    print("serves", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
