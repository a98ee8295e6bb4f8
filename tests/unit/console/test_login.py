"""`beaker login`: the way from a terminal into the console."""

from __future__ import annotations

import json

import pytest

from beaker_sessions.cli import main
from tests.browser import Browser
from tests.lab import Lab


@pytest.fixture(autouse=True)
def logged_in(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAKER_ADDR", lab.address)
    monkeypatch.setenv("BEAKER_INSECURE_ADDRESSES", lab.address)
    monkeypatch.setenv("BEAKER_TOKEN", lab.tokens["ann"])
    monkeypatch.setenv("BEAKER_CONFIG", "/nonexistent")


def test_login_prints_a_link_that_works_once(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["login"]) == 0
    said = capsys.readouterr()
    assert "once" in said.err
    assert said.out.startswith(f"{lab.address}/sign-in?link=")
    assert lab.tokens["ann"] not in said.out
    browser = Browser(lab)
    link = said.out.strip().removeprefix(lab.address)
    assert "Sign in as ann" in browser.get(link).text
    assert browser.post("/sign-in", {"link": link.partition("=")[2]}).status == 303
    assert browser.get("/clusters").status == 200
    assert Browser(lab).get(link).status == 401


def test_login_for_programs_and_without_a_token(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main.run(["login", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"].startswith(lab.address)
    monkeypatch.delenv("BEAKER_TOKEN")
    assert main.run(["login"]) == 77
    assert "not logged in" in capsys.readouterr().err


def test_the_short_list_of_commands_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([]) == 0
    assert "\n  login " in capsys.readouterr().out
