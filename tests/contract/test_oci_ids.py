"""Whose ids are in whose sandbox: real ones of nobody else, though a directory may tell of anybody at any time."""

from __future__ import annotations

from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.model import Identity
from beaker_sessions.sandbox import subordinate
from beaker_sessions.sandbox.oci import userns

from .conftest import Lab, Maker, OciLab


@pytest.fixture
def etc(lab: Lab) -> Path:
    if not isinstance(lab, OciLab):
        pytest.skip("only sandboxes of the oci driver have subordinate ids")
    return lab.etc


def person(name: str, id: int) -> Identity:
    return Identity(name, id, id, "/", {id: name})


def range_of(name: str, etc: Path) -> int:
    return next(first for owner, first, _ in subordinate.ranges(etc / "subuid") if owner == name)


def refusal(make: Maker, identity: Identity) -> str:
    with pytest.raises(Error) as error:
        make.start(make.spec("true", identity=identity))
    return error.value.code


def test_nobody_whose_id_lies_in_a_range(make: Maker, etc: Path) -> None:
    make.start(make.spec("sleep", "1000"))
    inside = range_of("ada", etc) + 1000
    assert refusal(make, person("dora", inside)) == "forbidden"
    assert refusal(make, Identity("emil", 1700, 1700, "/", {1700: "emil", inside: "lab"})) == "forbidden"


def test_nobody_whose_id_lies_in_the_range_of_what_runs_though_no_file_says_so(make: Maker, etc: Path) -> None:
    """The administrator has given ada other ids, as doctor said, but a session of hers with the old ones still runs."""
    spec = make.spec("sleep", "1000")
    make.start(spec)
    dora = person("dora", range_of("ada", etc) + 1000)
    texts = {file: file.read_text() for file in (etc / "subuid", etc / "subgid")}
    try:
        for file in texts:
            file.write_text("ada:1900000000:65536\n")
        assert refusal(make, dora) == "conflict"
        make.lab.sandboxes = make.lab.again()  # as after a restart of the executor
        assert refusal(make, dora) == "conflict"
        make.lab.sandboxes.remove(spec.id)
        make.ids.remove(spec.id)
        make.start(make.spec("true", identity=dora)).read()
    finally:
        for file, text in texts.items():
            file.write_text(text)


def test_a_range_does_not_come_to_hold_somebody_who_has_a_session(make: Maker, etc: Path) -> None:
    dora = person("dora", 1_800_000_000 + 5)
    make.start(make.spec("sleep", "1000", identity=dora))
    for file in (etc / "subuid", etc / "subgid"):
        with file.open("a") as lines:
            lines.write("fred:1800000000:65536\n")
    try:
        assert refusal(make, person("fred", 1701)) == "conflict"
    finally:
        for file in (etc / "subuid", etc / "subgid"):
            file.write_text(file.read_text().replace("fred:1800000000:65536\n", ""))


def test_no_root_inside_over_people_of_a_directory_who_never_came(make: Maker, etc: Path) -> None:
    make.start(make.spec("true")).read()
    texts = {file: file.read_text() for file in (etc / "subuid", etc / "subgid")}
    (etc / "nsswitch.conf").write_text("passwd: files lab\n")
    try:
        make.start(make.spec("true")).read()  # those that were allotted are above
        for file in texts:
            file.write_text("ada:1500000000:65536\n")
        assert refusal(make, person("ada", 1500)) == "conflict"
    finally:
        (etc / "nsswitch.conf").unlink()
        for file, text in texts.items():
            file.write_text(text)


def test_root_of_the_machine_has_no_sandbox(make: Maker, etc: Path) -> None:
    assert refusal(make, Identity("root", 0, 0, "/root", {0: "root"})) == "forbidden"
    assert not [first for _, first, count in subordinate.ranges(etc / "subuid") if first < userns.SIZE < first + count]
