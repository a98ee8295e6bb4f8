"""What doctor says of the versions of what sessions depend on: what is known, and what is not."""

from __future__ import annotations

import re
import shutil
import subprocess
from datetime import date, timedelta
from pathlib import Path

import pytest

from beaker_sessions.sandbox import vulnerabilities
from beaker_sessions.sandbox.vulnerabilities import Package, at_least, judge, parse

THREE = "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881"


@pytest.mark.parametrize(
    ("name", "version", "level"),
    [
        ("runc", "1.1.11", "warning"), ("runc", "1.1.12", "warning"), ("runc", "1.2.8", "warning"),
        ("runc", "1.3.5", "warning"), ("runc", "1.3.6", "ok"), ("runc", "1.4.2", "warning"), ("runc", "1.4.3", "ok"),
        ("runc", "1.5.0-rc.2", "warning"), ("runc", "1.5.0-rc.3", "ok"), ("runc", "1.5.0", "ok"),
        ("runc", "2.0.0", "ok"), ("nvidia-container-toolkit", "1.16.2", "warning"),
        ("nvidia-container-toolkit", "1.17.8", "warning"), ("nvidia-container-toolkit", "1.19.1", "ok"),
        ("nvidia-container-toolkit", "1.20.0", "ok"), ("nvidia-driver", "535.129.03", "warning"),
        ("nvidia-driver", "535.309.01", "ok"), ("nvidia-driver", "570.1.1", "warning"),
        ("nvidia-driver", "580.159.03", "ok"), ("nvidia-driver", "595.71.05", "ok"), ("nvidia-driver", "600.1.1", "ok"),
        ("slurm", "24.05.8", "warning"), ("slurm", "25.05.9", "ok"), ("slurm", "25.11.7", "warning"),
        ("conmon", "2.1.6", "ok"), ("crun", "1.27.1", "warning"),
    ],
)  # fmt: skip
def test_without_a_package_the_version_says_it(name: str, version: str, level: str) -> None:
    found = judge(name, parse(f"{name} version {version}\nspec: 1.0.2-dev"), version, None)
    assert (found.level, bool(found.mend)) == (level, level == "warning"), found
    assert ("CVE-2024-21626" in found.what) == (version == "1.1.11")


def test_what_mends_it_is_said_and_that_it_is_not_known() -> None:
    assert "CVE-2026-24260 in 1.19.1" in judge("nvidia-container-toolkit", parse("1.17.8"), "it", None).what
    found = judge("crun", parse("1.30.1"), "crun 1.30.1", None)
    assert "CVE-2026-88264 in no version known here" in found.what


def debian(version: str, changelog: str = "", release: str = "debian-12") -> Package:
    return Package("runc", version, release, changelog)


def test_a_package_is_judged_by_its_own_version_and_by_its_changelog() -> None:
    old = parse("runc version 1.1.5+ds1")
    if shutil.which("dpkg"):
        found = judge("runc", old, "runc 1.1.5", debian("1.1.5+ds1-1"))
        assert "CVE-2024-21626" in found.what
        found = judge("runc", old, "runc 1.1.5", debian("1.1.5+ds1-1+deb12u1"))
        assert "CVE-2024-21626" not in found.what
    log = "runc (1.1.5+ds1-1+deb12u1) bookworm-security\n  * CVE-2024-21626: container breakouts"
    found = judge("runc", old, "runc 1.1.5", debian("1.1.5", log, "other-1"))
    assert found.level == "warning"
    assert f"does not say that it has mended {THREE}" in found.what
    assert found.what.endswith("it may have, or not")
    found = judge("runc", old, "runc 1.1.5", debian("1.1.5", f"{log}\n  * {THREE} CVE-2026-41579", "other-1"))
    assert found.level == "ok"
    assert found.what == f"runc 1.1.5: its package has mended CVE-2024-21626, {THREE}, CVE-2026-41579"


def test_a_package_without_its_changelog_is_not_called_vulnerable() -> None:
    found = judge("runc", parse("1.1.5"), "runc 1.1.5", debian("1.1.5", "", "other-1"))
    assert (found.level, "it may have, or not" in found.what) == ("warning", True)


@pytest.mark.skipif(not shutil.which("apt-cache"), reason="needs apt")
def test_a_silent_package_without_a_newer_one_is_no_warning_that_nobody_can_mend() -> None:
    policy = subprocess.run(["apt-cache", "policy", "runc"], capture_output=True, text=True, check=True).stdout
    newest = next(line.split()[1] for line in policy.splitlines() if "Candidate:" in line)
    found = judge("runc", parse("1.1.5"), "runc 1.1.5", debian(newest, "", "other-1"))
    assert (found.level, found.mend) == ("ok", "")
    assert found.what.startswith("runc 1.1.5 is the newest that apt knows; its package does not say")
    found = judge("runc", parse("1.1.5"), "runc 1.1.5", debian("0.1", "", "other-1"))
    assert (found.level, found.mend) == ("warning", "apt-get update; apt-get install --only-upgrade runc")


@pytest.mark.skipif(not shutil.which("dpkg"), reason="needs dpkg")
def test_versions_are_compared_as_dpkg_does() -> None:
    assert at_least("1.1.5+ds1-1+deb12u10", "1.1.5+ds1-1+deb12u9")
    assert not at_least("1.1.5+ds1-1+b1", "1.1.5+ds1-1+deb12u1")
    assert not at_least("1.3.6~rc1", "1.3.6")
    assert at_least("1:0.1", "9.9")


def test_a_version_that_is_not_told_is_not_taken_for_a_good_one() -> None:
    assert vulnerabilities.finding("runc", "").level == "warning"


def test_the_file_says_how_old_it_is_and_where_it_is_from() -> None:
    data = vulnerabilities._file()
    written: date = data["date"]
    assert vulnerabilities.age(written + timedelta(days=180)).level == "ok"
    late = vulnerabilities.age(written + timedelta(days=181))
    assert (late.level, "181 days" in late.what, bool(late.mend)) == ("warning", True, True)
    for component in data["components"].values():
        for flaw in component["flaws"]:
            assert flaw["source"]
            assert flaw["effect"]
            assert all(re.fullmatch(r"CVE-\d{4}-\d{4,}", id) for id in flaw["ids"])
            firsts = [parse(str(text)) for text in flaw["fixed"]] if flaw["fixed"] != "unknown" else []
            assert all(firsts)
            assert firsts == sorted(firsts)


def test_the_drivers_version_is_read_from_the_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "NVRM version: NVIDIA UNIX {}  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version:  gcc 12.2.0\n"
    for kind in ("x86_64 Kernel Module", "Open Kernel Module for x86_64"):
        (tmp_path / "version").write_text(text.format(kind))
        monkeypatch.setattr(vulnerabilities, "NVIDIA", tmp_path / "version")
        found = list(vulnerabilities.installed())[-1]
        assert (found.level, "535.129.03" in found.what) == ("warning", True)
