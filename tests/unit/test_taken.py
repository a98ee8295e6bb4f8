"""What doctor says of subordinate ids where others have people."""

from __future__ import annotations

from pathlib import Path

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
