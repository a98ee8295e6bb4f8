"""What doctor says of subordinate ids where others have people."""

from __future__ import annotations

from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.model import Identity
from beaker_sessions.sandbox.oci import taken, userns
from beaker_sessions.settings import ExecutorSettings

OURS = (userns.FIRST, userns.LAST)
OLD = ("ada", 0x80000, 65536)  # where ranges were before


def problems(etc: Path, ids: tuple[int, int] = OURS, *ranges: tuple[str, int, int]) -> list[str]:
    return [what for what, _ in taken.problems(etc, ids, list(ranges))]


def sssd(etc: Path, text: str) -> None:
    (etc / "sssd").mkdir(exist_ok=True)
    (etc / "sssd/sssd.conf").write_text(text)


def test_the_default_meets_nobody_s_default(tmp_path: Path) -> None:
    assert userns.interval(ExecutorSettings().subordinate_ids) == OURS
    assert problems(tmp_path, OURS, OLD) == []
    (tmp_path / "login.defs").write_text(
        "# UID_MAX 9\nUID_MIN 1000\nUID_MAX\t\t60000\nSUB_UID_MIN 2000224256\nGID_MAX\n"
    )
    sssd(tmp_path, "[sssd]\ndomains = lab\n[domain/lab]\nid_provider = ad\n")
    assert not [what for what in problems(tmp_path) if what.startswith("subordinateIds")]


def test_ranges_among_the_ids_of_a_directory_are_named(tmp_path: Path) -> None:
    for text in (
        "[domain/lab]\nid_provider = ad\n",
        "[domain/lab]\nid_provider = ldap\nldap_id_mapping = True\n",
        "[domain/lab]\nid_provider = ldap\nldap_id_mapping = true\nldap_idmap_range_max = 600000\n",
        "[domain/lab]\nid_provider = ldap\nmin_id = 500000\nmax_id = 530000\n",
        "[domain/lab]\nid_provider = ipa\n",
    ):
        sssd(tmp_path, text)
        (found,) = [what for what in problems(tmp_path, OURS, OLD, ("ben", OURS[0], 65536)) if "ada" in what]
        assert "SSSD's domain lab" in found, text
    sssd(tmp_path, "[domain/lab]\nid_provider = ldap\nmin_id = 5000\nmax_id = 9000\n")
    assert problems(tmp_path, OURS, OLD) == []


def test_a_setting_where_people_are_is_named(tmp_path: Path) -> None:
    sssd(tmp_path, "[domain/lab]\nid_provider = ad\n")
    assert any("SSSD's domain lab" in what for what in problems(tmp_path, (0x80000, 0x6FFF0000)))
    assert any("UID_MIN" in what for what in problems(tmp_path, (50000, 500000)))
    assert any("homed" in what for what in problems(tmp_path, (60000, 500000)))


def test_useradd_that_gives_out_ranges_where_people_are_is_named(tmp_path: Path) -> None:
    sssd(tmp_path, "[domain/lab]\nid_provider = ad\n")
    assert [what for what in problems(tmp_path) if what.startswith("useradd")]


def test_what_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    sssd(tmp_path, "no section\n[domain/lab\n")
    (tmp_path / "login.defs").write_bytes(b"UID_MIN \xff\nUID_MAX many\n")
    assert problems(tmp_path, OURS, OLD) == []


LISTED, USERADD, SECOND = OURS[0] + 65536, 100000, 231072


@pytest.mark.parametrize(
    ("sources", "files", "start", "refused"),
    [
        ("files sss", {"sssd/sssd.conf": "[domain/lab]\nid_provider = ad\n"}, SECOND, True),
        ("files sss", {"sssd/sssd.conf": "[domain/lab]\nid_provider = ad\n"}, USERADD, False),
        ("files sss", {"sssd/sssd.conf": "[domain/lab]\nid_provider = ad\n"}, LISTED, False),
        ("files sss", {"sssd/sssd.conf": "[domain/lab]\nid_provider = ldap\n"}, SECOND, True),
        (
            "sss [NOTFOUND=return] files",
            {"sssd/conf.d/a.conf": "[domain/lab]\nid_provider = ldap\nmin_id = 5000\nmax_id = 120000\n"},
            USERADD,
            True,
        ),
        ("sss files", {"sssd/sssd.conf": "[domain/lab]\nid_provider=ldap\nmin_id=5000\nmax_id=90000\n"}, SECOND, False),
        ("files sss", {}, SECOND, False),  # as Fedora has it everywhere
        ("files systemd # sss", {"sssd/sssd.conf": "[domain/lab]\nid_provider = ad\n"}, SECOND, False),
        ("compat", {}, SECOND, False),
        ("files ldap", {}, SECOND, True),
        ("files unheard-of", {}, SECOND, True),
        ("files unheard-of", {}, USERADD, False),
        ("files winbind", {"samba/smb.conf": "[global]\nidmap config * : range = 3000-7999\n"}, SECOND, False),
        ("files winbind", {"samba/smb.conf": " idmap config LAB:range=10000 - 999999\n"}, USERADD, True),
        ("files winbind", {}, SECOND, True),
    ],
)
def test_a_range_where_a_directory_that_is_in_use_has_people_is_refused(
    sources: str, files: dict[str, str], start: int, refused: bool, tmp_path: Path
) -> None:
    """Also when none of them has ever used this machine: nothing lists them, and root inside would be any of them."""
    (tmp_path / "nsswitch.conf").write_text(f"hosts: files dns\npasswd:\t{sources}\n")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    for file in ("subuid", "subgid"):
        (tmp_path / file).write_text(f"ada:{start}:65536\n")
    ada = Identity("ada", 999_999, 999_999, "/home/ada")
    if not refused:
        assert userns.subordinate(ada, tmp_path) == start
        return
    with pytest.raises(Error, match=f"subordinate ids {start}… of ada lie among") as error:
        userns.subordinate(ada, tmp_path)
    assert error.value.code == "conflict"
    assert "subordinateIds" in error.value.hint
    for file in ("subuid", "subgid"):
        (tmp_path / file).write_text("")  # as the hint says
    assert userns.subordinate(ada, tmp_path) == OURS[0]


def test_sources_of_groups_count_too(tmp_path: Path) -> None:
    (tmp_path / "nsswitch.conf").write_text("passwd: files\ngroup: files lab\n")
    assert [who for who, _, _ in taken.people(tmp_path)] == ["the directory service lab (nsswitch.conf)"]
