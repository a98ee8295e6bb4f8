"""Takes the pictures of terminals that the guide shows: `python -m docs.terminals`, as root.

Real sessions of a stack of its own, from the default image, with made-up GPUs; the output of a real pseudo-terminal,
drawn by a terminal emulator (pyte) into SVG. The pictures go to docs/img.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from html import escape
from itertools import groupby
from pathlib import Path

import pexpect
import pyte

from setup import recipe
from tests import images
from tests.stack import BIN, Stack, User, wait_for

IMAGES = Path(__file__).parent / "img"
COLUMNS = 100
CELL, LINE, PAD = 8.4, 18, 14  # pixels of a character's width, of a line, and around them
COLOURS = {
    "default": "#d8dee9", "black": "#3b4252", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b",
    "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#eceff4", "brightblack": "#7f8794",
}  # fmt: skip
GROUND = "#1e2430"


class Shell:
    """A user's Bash on the machine, in an emulated terminal."""

    def __init__(self, user: User, rows: int) -> None:
        self.screen = pyte.Screen(COLUMNS, rows)
        self._stream = pyte.ByteStream(self.screen)
        process = user.process()

        def become() -> None:
            os.setgroups(process["extra_groups"])
            os.setgid(process["group"])
            os.setuid(process["user"])

        env = {**process["env"], "PATH": f"{BIN}:/usr/bin:/bin", "PS1": r"ada@gpu-1:\w$ ", "TERM": "xterm-256color"}
        self.child = pexpect.spawn(
            "bash", ["--norc", "--noprofile", "-i"], env=env, cwd=str(process["cwd"]), dimensions=(rows, COLUMNS),
            preexec_fn=become, timeout=60,
        )  # fmt: skip
        self.wait(r"\$")

    def wait(self, pattern: str) -> str:
        """Read until the screen's last lines match."""
        deadline = time.monotonic() + 60
        while True:
            try:
                self._stream.feed(shorten(self.child.read_nonblocking(1 << 16, timeout=0.3)))
                continue
            except pexpect.TIMEOUT:
                pass
            text = "\n".join(line.rstrip() for line in self.screen.display).rstrip()
            if re.search(pattern + r"$", text):
                return text
            if time.monotonic() > deadline:
                raise TimeoutError(f"{pattern!r} does not come:\n{text}")

    def type(self, line: str, until: str = r"\$") -> str:
        self.child.send(line + "\r")
        time.sleep(0.2)
        return self.wait(until)

    def save(self, name: str) -> None:
        target = IMAGES / f"terminal-{name}.svg"
        target.write_text(svg(self.screen))
        print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


def shorten(data: bytes) -> bytes:
    """As if users had the names that the guide gives them: those of tests are unique on their machine. Columns stay."""
    data = re.sub(rb"\b(ada|bob)(-\w+)(?=  )", lambda found: found[1] + b" " * len(found[2]), data)
    return re.sub(rb"\b(ada|bob)-\w+", rb"\1", data)


def svg(screen: pyte.Screen) -> str:
    """The screen's lines down to the last that is not empty, with colours, bold and inverse."""
    used = max((n for n in range(screen.lines) if screen.display[n].strip()), default=0) + 1
    width, height = screen.columns * CELL + 2 * PAD, used * LINE + 2 * PAD
    style = 'font-family="ui-monospace, SFMono-Regular, Menlo, \'DejaVu Sans Mono\', monospace" font-size="14"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" {style}>',
        f'<rect width="100%" height="100%" rx="8" fill="{GROUND}"/>',
    ]
    for number in range(used):
        parts += _line(screen, number)
    return "\n".join([*parts, "</svg>", ""])


def _line(screen: pyte.Screen, number: int) -> Iterator[str]:
    cells = [screen.buffer[number][column] for column in range(screen.columns)]
    column, top = 0, PAD + number * LINE
    for (fg, bg, bold), group in groupby(cells, key=_look):
        text = "".join(cell.data for cell in group)
        left, wide = PAD + column * CELL, len(text) * CELL
        column += len(text)
        if bg != GROUND:
            yield f'<rect x="{left:.1f}" y="{top}" width="{wide:.1f}" height="{LINE}" fill="{bg}"/>'
        if text.strip():
            start = len(text) - len(text.lstrip())
            left, shown = left + start * CELL, text.strip()
            weight = ' font-weight="bold"' if bold else ""
            yield (
                f'<text x="{left:.1f}" y="{top + 13}" fill="{fg}"{weight} xml:space="preserve" '
                f'textLength="{len(shown) * CELL:.1f}">{escape(shown)}</text>'
            )


def _look(cell: pyte.screens.Char) -> tuple[str, str, bool]:
    fg = COLOURS.get(cell.fg, f"#{cell.fg}")
    bg = GROUND if cell.bg == "default" else COLOURS.get(cell.bg, f"#{cell.bg}")
    return (bg, fg, cell.bold) if cell.reverse else (fg, bg, cell.bold)


def take(stack: Stack, ada: User, bob: User) -> None:
    """All of them, in the order of the guide."""
    shell = Shell(ada, 20)
    shell.type("beaker session create --gpus 2 --name train --timeout 8h", r"\[BEAKER\] ada ~ \$")
    shell.type("echo $BEAKER_ASSIGNED_GPU_COUNT; git lfs version; uv --version", r"\[BEAKER\] ada ~ \$")
    shell.save("create")

    other = Shell(bob, 14)
    other.child.send("beaker session create --gpus 8\r")
    other.wait(r"(?s)Place in the queue: 1.*free\)")
    other.save("queue")
    other.child.sendintr()
    other.wait(r"\$")

    second = Shell(ada, 22)
    second.type("beaker session exec -- ps -o pid,tty,args")
    second.type("beaker session exec", r"\[BEAKER\] ada ~ \$")
    second.save("exec")
    second.type("exit")

    shell.type("for epoch in 1 2 3; do echo epoch $epoch; done", r"\[BEAKER\] ada ~ \$")
    shell.child.send("\x1ed")
    shell.wait(r"ada@gpu-1:~\$")
    shell.type("clear")
    shell.type("beaker session list")
    shell.type("beaker session attach train", r"\[BEAKER\] ada ~ \$")
    shell.save("attach")

    create = ("session", "create", "--detach", "--gpus")
    bob.beaker(*create, "3", "--name", "sweep", "--", "sleep", "1000")
    bob.beaker(*create, "8", "--name", "large", "--", "sleep", "1000")
    wait_for("both", lambda: len(stack.sandboxes()) == 2)
    time.sleep(25)  # two samples of what they use
    second.screen.reset()
    second.child.send("beaker session top --all\r")
    second.wait(r"(?s)SESSION.*large.*")
    second.save("top")
    for one in (shell, second, other):
        one.child.close(force=True)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="beaker-pictures-") as name:
        root = Path(name)
        root.chmod(0o755)
        stack = Stack(root, gpus=8, driver="oci", settings={"defaultImage": recipe.NAME, "hostname": "gpu-1.lab"})
        try:
            stack.start()
            archive = images.default(root / "image.tar")
            load = [str(BIN / "beaker"), "executor", "images", "load", str(archive), recipe.NAME]
            env = {**os.environ, "BEAKER_SOCKET": str(stack.socket)}
            subprocess.run(load, env=env, check=True, capture_output=True)
            take(stack, stack.user("ada"), stack.user("bob"))
            stack.settle()
        finally:
            stack.close()


if __name__ == "__main__":
    main()
