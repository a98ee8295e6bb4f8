"""The guides say what the programs do: commands parse, the reference is the commands' own, the site builds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from beaker_sessions.cli import args, main
from setup import reference

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Where a page says what somebody types, names stand for what they choose.
CODE = re.compile(r"^ *```[a-z]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """Every command line of `beaker` in the page's code, without comments and what a shell does around it."""
    text = page.read_text()
    lines = [line.strip() for block in CODE.findall(text) for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", CODE.sub("", text))
    return [line for line in lines if re.match(r"beaker [a-z]", line) and not re.search(r"[…{]", line)]


def test_the_reference_is_up_to_date() -> None:
    assert reference.PAGE.read_text() == reference.text(), "run: make docs"


@pytest.mark.parametrize(
    ("page", "line"), [pytest.param(page.name, line, id=line) for page in PAGES for line in commands(page)]
)
def test_every_command_of_the_guides_exists(page: str, line: str) -> None:  # noqa: ARG001
    words = re.split(r"  +| [<>|] ", line)[0].replace('"', "").split()[1:]
    shown = [word.strip("[]") for word in words]
    shown = shown[: shown.index("--")] if "--" in shown else shown
    name = next((" ".join(shown[:n]) for n in (2, 1) if " ".join(shown[:n]) in {*main.COMMANDS, *main.NOUNS}), "")
    assert name, f"no such command: {line}"
    if name in main.COMMANDS:
        module, function, _ = main.COMMANDS[name]
        command: args.Command = getattr(__import__(f"{main.__package__}.{module}", fromlist=[function]), function)
        known = {f"--{flag.name}" for flag in command.flags} | {f"-{flag.short}" for flag in command.flags}
        assert [word for word in shown if word.startswith("-") and word.partition("=")[0] not in known] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    index = (tmp_path / "site/index.html").read_text()
    assert "Beaker Sessions" in index
    fetched = re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)=["'](https?:[^"']+)""", index)
    assert fetched == [], "the site fetches from elsewhere"


def test_the_messages_that_the_guide_explains_are_ours() -> None:
    """Each row's message, between its gaps, is in the source; those of other programs and of a shell are named here."""
    others = {"The agent has no identities.", "exit code 127", "a prompt without `[BEAKER]", "Disk quota exceeded"}
    kinds = ("there is no secret", "there is no …")  # `rules.found` says what it was
    table = (ROOT / "docs/interactive.md").read_text().partition("## When something goes wrong")[2]
    messages = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[2:]
    # Adjacent literals are one text, whose values are gaps too.
    source = "".join(path.read_text() for path in (ROOT / "beaker_sessions").rglob("*.py"))
    source = re.sub(r"\{[^{}]*\}", "…", re.sub(r'"\s*\n\s*f?"', "", source))
    for message in (message.strip("`") for message in messages if message.strip("`") not in others):
        for part in filter(None, (part.strip(" :") for part in message.split("…"))):
            assert part.replace(*kinds) in source, message
    assert len(messages) > 12
