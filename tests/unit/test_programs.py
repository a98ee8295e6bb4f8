"""The copies of programs that the driver runs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from beaker_sessions.sandbox.oci import programs


def script(path: Path, says: str) -> Path:
    new = path.with_suffix(".new")
    new.write_text(f"#!/bin/sh\necho {says}\n")
    new.chmod(0o755)
    return new.replace(path)


def test_a_program_runs_from_a_copy_that_nobody_can_write_to(tmp_path: Path) -> None:
    path = script(tmp_path / "tool", "one")
    copy = programs.sealed(str(path))
    assert copy != str(path)
    assert subprocess.check_output([copy]) == b"one\n"
    with pytest.raises(PermissionError), open(copy, "r+b", buffering=0) as file:
        file.write(b"#!/bin/sh\necho evil\n")
    path.write_text("gone")
    assert subprocess.check_output([copy]) == b"one\n"


def test_a_program_that_was_upgraded_is_copied_anew(tmp_path: Path) -> None:
    path = script(tmp_path / "tool", "one")
    first = programs.sealed(str(path))
    assert programs.sealed(str(path)) == first
    script(path, "two")
    assert subprocess.check_output([programs.sealed(str(path))]) == b"two\n"


def test_a_program_whose_copy_does_not_run_is_itself(tmp_path: Path) -> None:
    path = tmp_path / "tool"
    path.write_bytes(b"\x7fELF of another machine")
    path.chmod(0o755)
    assert programs.sealed(str(path)) == str(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        programs.sealed(str(path))
