"""What doctor says of the versions of OCI runtimes: what is known, and what is not."""

from __future__ import annotations

import pytest

from beaker_sessions.sandbox import runtimes

THREE = "CVE-2025-31133, CVE-2025-52565, CVE-2025-52881"


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("1.1.11", "warning"), ("1.1.12", "warning"), ("1.2.7", "warning"), ("1.2.8", "ok"), ("1.3.2", "warning"),
        ("1.3.3", "ok"), ("1.4.0-rc.2", "warning"), ("1.4.0-rc.3", "ok"), ("1.4.0", "ok"), ("2.0.0", "ok"),
    ],
)  # fmt: skip
def test_without_a_package_the_version_says_it(version: str, level: str) -> None:
    text = f"runc version {version}\nspec: 1.0.2-dev"
    found = runtimes.judge("runc", runtimes.parse(text), version, None)
    assert (found.level, bool(found.mend)) == (level, level == "warning")
    assert ("CVE-2024-21626" in found.what) == (version == "1.1.11")


def test_a_package_is_judged_by_its_changelog() -> None:
    old = runtimes.parse("runc version 1.1.5+ds1")
    log = "runc (1.1.5+ds1-1+deb12u1) bookworm-security\n  * CVE-2024-21626: container breakouts"
    found = runtimes.judge("runc", old, "runc 1.1.5", log)
    assert found.level == "warning"
    assert found.what.endswith(f"does not say that it has mended {THREE}, and may be vulnerable or not")
    found = runtimes.judge("runc", old, "runc 1.1.5", f"{log}\n  * {THREE}")
    assert found.level == "ok"
    assert found.what == f"runc 1.1.5: its package has mended CVE-2024-21626, {THREE}"


def test_a_package_without_its_changelog_is_not_called_vulnerable() -> None:
    found = runtimes.judge("runc", runtimes.parse("1.1.5"), "runc 1.1.5", "")
    assert found.level == "warning"
    assert "vulnerable or not" in found.what


def test_crun_has_none_of_them() -> None:
    assert runtimes.judge("crun", runtimes.parse("crun version 1.8.1"), "crun 1.8.1", None).level == "ok"
    assert runtimes.judge("crun", runtimes.parse("crun version 1.4.3"), "crun 1.4.3", None).level == "warning"


def test_a_version_that_is_not_told_is_not_taken_for_a_good_one() -> None:
    assert runtimes.finding("runc", "").level == "warning"
