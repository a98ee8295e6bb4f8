"""Account files: the caller resolves, whatever the image thinks."""

from __future__ import annotations

import grp
import os
import pwd
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_sessions.errors import Error
from beaker_sessions.model import Identity
from beaker_sessions.sandbox import identity

ADA = Identity("ada", 1500, 1500, "/home/ada", {1500: "ada", 27: "sudo", 998: "docker"})
IMAGE_PASSWD = """\
root:x:0:0:root:/root:/bin/bash
ubuntu:x:1500:1500:Ubuntu:/home/ubuntu:/bin/bash
ada:x:1001:1001::/srv/ada:/bin/false
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
IMAGE_GROUP = """\
root:x:0:
sudo:x:27:ubuntu,ada
docker:x:101:ada,bob
ubuntu:x:1500:
nogroup:x:65534:
"""


def _by(text: str, column: int) -> dict[str, list[str]]:
    """Lines by one column; what a C library would find first wins."""
    lines = [line.split(":") for line in reversed(text.splitlines())]
    return {fields[column]: fields for fields in lines}


def test_image_s_lines_make_way() -> None:
    text = identity.passwd(IMAGE_PASSWD, ADA, "/bin/sh")
    assert text.splitlines() == [
        "root:x:0:0:root:/root:/bin/bash",
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin",
        "ada:x:1500:1500:ada:/home/ada:/bin/sh",
    ]


def test_groups_have_this_machine_s_names() -> None:
    assert identity.group(IMAGE_GROUP, ADA).splitlines() == [
        "root:x:0:",
        "docker-101:x:101:bob",
        "nogroup:x:65534:",
        "ada:x:1500:ada",
        "sudo:x:27:ada,ubuntu",
        "docker:x:998:ada",
    ]


def test_image_without_account_files() -> None:
    assert _by(identity.passwd(None, ADA, "/bin/sh"), 0).keys() == {"root", "nobody", "ada"}
    assert _by(identity.group(None, ADA), 2).keys() == {"0", "65534", "1500", "27", "998"}


def test_root_by_another_name_is_found_by_that_name() -> None:
    toor = Identity("toor", 0, 0, "/root", {0: "wheel"})
    text = identity.passwd(IMAGE_PASSWD, toor, "/bin/sh")
    assert (_by(text, 2)["0"][0], "root" in _by(text, 0)) == ("toor", True)
    assert _by(identity.group(IMAGE_GROUP, toor), 2)["0"][0] == "wheel"


def test_shadow_lets_sudo_and_no_password_in() -> None:
    lines = _by(identity.shadow("root:*:1:0:9:7:::\nada:$y$stolen:1:0:9:7:::\n", ADA), 0)
    assert (lines["ada"][1], lines["root"][1]) == ("*", "*")


@pytest.mark.parametrize("field", ["name", "home"])
@pytest.mark.parametrize("text", ["a:b", "a\nroot::0:0::/:/bin/sh"])
def test_what_would_make_another_line_is_refused(field: str, text: str) -> None:
    with pytest.raises(Error) as error:
        identity.passwd(None, replace(ADA, **{field: text}), "/bin/sh")
    assert error.value.code == "invalid"


lines = st.lists(
    st.tuples(st.sampled_from(["root", "ada", "bob", "", "+", "sudo"]), st.sampled_from(["0", "27", "1500", "x"])).map(
        lambda pair: f"{pair[0]}:x:{pair[1]}:0::/:/bin/sh"
    )
    | st.text(max_size=20)
)


@given(lines, st.sampled_from([0, 27, 1500]), st.sampled_from(["ada", "root", "sudo"]))
def test_the_caller_resolves_both_ways_in_any_file(image: list[str], uid: int, name: str) -> None:
    caller = Identity(name, uid, 1500, "/home/x", {1500: "ada", 27: "sudo"})
    text = "\n".join(image)
    passwd = identity.passwd(text, caller, "/bin/sh")
    assert _by(passwd, 0)[name][2] == str(uid)
    assert _by(passwd, 2)[str(uid)][0] == name
    group = identity.group(text, caller)
    for gid, known in caller.groups.items():
        assert _by(group, 2)[str(gid)][0] == known
        assert _by(group, 0)[known][2] == str(gid)


def test_this_machine_s_own_files_are_understood() -> None:
    me = pwd.getpwuid(os.getuid())
    caller = Identity(me.pw_name, me.pw_uid, me.pw_gid, me.pw_dir, {me.pw_gid: grp.getgrgid(me.pw_gid).gr_name})
    with open("/etc/passwd") as file:
        assert len(identity.passwd(file.read(), caller, me.pw_shell).splitlines()) == len(pwd.getpwall())
