"""What the command does on its own: its grammar, its help, its configuration, how it prints and what it imports."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies

from beaker_sessions.cli import args, codec, config, jobs, main, output
from beaker_sessions.errors import Error

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def environ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("BEAKER_TOKEN", "BEAKER_ADDR", "BEAKER_CONFIG", "BEAKER_DEBUG", "SUDO_USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BEAKER_SOCKET", str(tmp_path / "door"))
    return tmp_path


@pytest.fixture
def door(environ: Path) -> Iterator[list[Any]]:
    """An executor that answers every connection with the next frames of the list, and keeps what it was asked."""
    answers: list[Any] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(environ / "door"))
        listener.listen()

        def serve() -> None:
            while True:
                connection, _ = listener.accept()
                with connection:
                    request = connection.recv(1 << 17)
                    if not request:
                        return
                    frames, answers[0] = answers[0], json.loads(request)
                    for frame in frames:
                        connection.send(json.dumps(frame).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        yield answers
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as last:
            last.connect(str(environ / "door"))
        thread.join()


# -- grammar


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("session create --gpus two", "--gpus: 'two' is not a whole number; for example --gpus 1"),
        ("session create --gpus -1", "--gpus: -1 is negative; for example --gpus 1"),
        ("session create --gpus=1.5", "--gpus: '1.5' is not a whole number; for example --gpus 1"),
        ("session create --cpus many", "--cpus: 'many' is not a number; for example --cpus 7.5"),
        ("session create --cpus nan", "--cpus: nan is more than any machine has; for example --cpus 7.5"),
        ("session create --memory", "--memory: needs a value; for example --memory 6.5GiB"),
        ("session create --memory --bare", "--memory: needs a value; for example --memory 6.5GiB"),
        ("session create --gpu 1", "unknown flag '--gpu'; did you mean '--gpus'?"),
        ("session create -x", "unknown flag '-x'; see --help; put -- before a command with flags"),
        ("session create --save-image", "--save-image is not supported yet; leave it out"),
        ("session create --pull no", "--pull: 'no' is none of always, missing, never; choose one of them"),
        ("session create --bare=1", "--bare: takes no value, but '1' was given; leave the value out"),
        ("session create --env =x", "--env: '=x' has no name; for example --env NAME=value"),
        ("session create --env UNSET", "--env: 'UNSET' is not set here; for example --env UNSET=value"),
        ("session attach a b", "unexpected argument 'b'; usage: [ID]"),
        ("session attach a --session b", "two sessions are named: 'a' and 'b'; name one"),
        ("session get", "an argument is missing; usage: ID..."),
        ("session list -- x", "unexpected argument 'x' after --; leave it out"),
        ("sesion create", "unknown command 'sesion'; did you mean 'session'?"),
        ("session crate", "unknown command 'session crate'; did you mean 'create'?"),
        ("config set user_tokn x", "no setting is called 'user_tokn'; did you mean 'user_token'?"),
        ("--format xml session list", "--format: 'xml' is none of table, json; choose one of them"),
    ],
)  # fmt: skip
def test_bad_usage_is_one_clear_line_and_exit_code_64(
    line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAKER_TOKEN", "t")
    assert main.run(line.split()) == 64
    assert capsys.readouterr() == ("", f"beaker: {message}\n")


def test_flags_may_stand_anywhere_before_the_command_and_are_its_own_after_it() -> None:
    from beaker_sessions.cli.session import create, exec

    for line in ("-q --gpus 2 -dn x python3 --version -q", "--quiet --gpus=2 -d --name=x -- python3 --version -q"):
        options = args.parse(create, line.split())
        assert (options["gpus"], options["name"], options["detach"], options.quiet) == (2, "x", True, True)
        assert options.command == ["python3", "--version", "-q"]
    for line in ("demo ls -l", "demo -- ls -l", "--session demo ls -l", "--session=demo -- ls -l"):
        options = args.parse(exec, line.split())
        assert ((options["session"] or options.words[0]), options.command) == ("demo", ["ls", "-l"])
    assert args.parse(create, ["--", "--", "x"]).command == ["--", "x"]
    assert args.parse(create, ["--env", "A=1", "--env=B=-2"])["env"] == ["A=1", "B=-2"]


def test_every_command_has_help_that_names_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for name, (_, _, summary) in main.COMMANDS.items():
        assert main.run([*name.split(), "--help"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"Usage: beaker {name} ")
        assert summary in out
    for noun in main.NOUNS:
        assert main.run([noun]) == 0
        assert capsys.readouterr().out.startswith(f"Usage: beaker {noun} COMMAND")
    assert main.run([]) == 0
    out = capsys.readouterr().out
    assert all(noun in out for noun in main.NOUNS)


def test_errors_are_json_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--format", "json", "session", "create", "--gpus", "two"]) == 64
    said = json.loads(capsys.readouterr().err)
    assert (said["code"], said["error"], said["message"]) == (400, "invalid", "--gpus: 'two' is not a whole number")


# -- nobody there


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("session create", 69, "no executor answers at "),
        ("session attach", 69, "no executor answers at "),
        ("session exec -- true", 69, "no executor answers at "),
        ("session stop", 69, "no executor answers at "),
        ("session list", 69, "no server answers at http://127.0.0.1:1"),
        ("session get 01HW8DZJFR6QEAFAABCTCR2BY2", 69, "no server answers at http://127.0.0.1:1"),
        ("account whoami", 69, "no server answers at http://127.0.0.1:1"),
        ("config test", 69, "no server answers at http://127.0.0.1:1"),
    ],
)
def test_a_missing_executor_or_server_is_said(
    line: str, code: int, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAKER_TOKEN", "t")
    monkeypatch.setenv("BEAKER_ADDR", "http://127.0.0.1:1")
    assert main.run(line.split()) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"beaker: {says}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", ["session attach", "session list", "account whoami", "account token"])
def test_without_a_token_one_learns_where_it_is(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(line.split()) == 77
    assert "http://127.0.0.1:8420/user" in capsys.readouterr().err


def test_create_without_token_and_terminal_is_an_error(door: list[Any]) -> None:
    door.append([])
    command = [sys.executable, "-m", "beaker_sessions.cli", "session", "create"]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, start_new_session=True)
    assert result.returncode == 77
    assert "beaker: you are not logged in" in result.stderr


# -- what the executor answers


def test_list_prints_an_escaped_table(
    door: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAKER_TOKEN", "t")
    job = {
        "id": "J1", "name": "a\x1b[2Jb", "author": {"name": "ai"}, "hostname": "gpu-1", "requests": {"gpuCount": 2},
        "status": {"created": "2026-01-01T00:00:00Z", "started": "2026-01-01T00:00:01Z", "exitCode": 0,
                   "exited": "2026-01-02T01:01:01Z", "finalized": "2026-01-02T01:01:02Z"},
    }  # fmt: skip
    door.append([{"job": job}, {"job": {"id": "J2", "name": "日本", "status": {}}}, {"end": True}])
    assert main.run(["session", "list", "--all"]) == 0
    assert door[0] == {"v": 1, "op": "list", "token": "t", "beat": True, "all": True, "finalized": False}
    assert capsys.readouterr().out.splitlines() == [
        "ID  NAME       AUTHOR  NODE   GPUS  STATUS     DURATION",
        "J1  a\\x1b[2Jb  ai      gpu-1  2     succeeded  25:01:00",
        "J2  日本       N/A     N/A    N/A   pending    N/A",
    ]


def test_quiet_and_json_are_for_programs(
    door: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAKER_TOKEN", "t")
    door.append([{"job": {"id": "J1", "status": {}}}, {"end": True}])
    assert main.run(["session", "list", "-q"]) == 0
    assert capsys.readouterr().out == "J1\n"
    door[0] = [{"job": {"id": "J1", "status": {}, "name": "\x1b"}}]
    assert main.run(["session", "get", "J1", "--format=json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"id": "J1", "status": {}, "name": "\x1b"}]


def test_the_executors_error_is_the_commands(
    door: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAKER_TOKEN", "t")
    door.append([{"error": Error("conflict", "you have 2 sessions here", "name one").as_dict()}])
    assert main.run(["session", "stop"]) == 73
    assert capsys.readouterr().err == "beaker: you have 2 sessions here; name one\n"


class Server:
    """One that has a session end at the third look, or never."""

    def __init__(self, ends: bool) -> None:
        self.looks, self.ends = 0, ends

    def update_job(self, id: str, body: dict[str, Any]) -> dict[str, Any]:
        assert body["status"]["canceled"]
        return {"id": id, "status": {"started": "x"}}

    def get_job(self, id: str) -> dict[str, Any]:
        self.looks += 1
        return {"id": id, "status": {"finalized": "x"} if self.ends and self.looks == 3 else {}}


@pytest.mark.parametrize("here", ["not here", "stuck"])
@pytest.mark.parametrize("ends", [True, False])
def test_a_stop_through_the_server_is_done_when_the_session_has_ended(
    here: str, ends: bool, door: list[Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEAKER_TOKEN", "t")
    monkeypatch.setattr(jobs, "LOOK", 0.001)
    monkeypatch.setattr(jobs, "STOPPING", 60.0 if ends else 0.1)
    server = Server(ends)
    monkeypatch.setattr("beaker_sessions.cli.rest.client", lambda _: server)
    error = Error("not_found", "no such session") if here == "not here" else Error("unavailable", "it does not end")
    door.append([{"error": error.as_dict()}])
    assert main.run(["session", "stop", "J1"]) == (0 if ends else 69)
    out, err = capsys.readouterr()
    assert out == ("Stopped session J1\n" if ends else "")
    if not ends:
        assert err.startswith("beaker: session J1 has not ended yet")


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ({}, "pending"),
        ({"scheduled": "x"}, "starting"),
        ({"scheduled": "x", "started": "x"}, "running"),
        ({"started": "x", "exited": "x"}, "uploading"),
        ({"exited": "x", "finalized": "x", "exitCode": 0}, "succeeded"),
        ({"finalized": "x", "exitCode": 1}, "failed"),
        ({"finalized": "x"}, "failed"),
    ],
)
def test_states_in_one_word(status: dict[str, Any], word: str) -> None:
    assert jobs.word({"status": status}) == word


# -- output


def test_nothing_that_a_terminal_obeys_gets_through() -> None:
    hostile = "a\x00\x07\x1b]8;;x\x1b\\\x7f\x9b1m\r\n\t\u202e\u2066\u200e\u061c\u2028\ufeff\udc80z"
    escaped = output.escape(hostile)
    assert escaped.isprintable()
    assert escaped.startswith("a\\x00\\x07\\x1b]8;;x")
    assert escaped.endswith("\\udc80z")
    assert output.escape("Grüße, 日本 \N{SNOWMAN}") == "Grüße, 日本 \N{SNOWMAN}"


def test_a_closed_pipe_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "beaker_sessions.cli", "--help"]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


# -- configuration


def test_the_configuration_keeps_what_is_not_ours(environ: Path) -> None:
    file = environ / ".beaker/config.yml"
    file.parent.mkdir()
    file.write_text('# mine\nother:\n  - nested: 1\nagent_address: \'http://x:1\'  # the lab\nuser_token: "a\\"b"\n')
    file.chmod(0o600)
    settings = config.load()
    assert (settings.address, settings.token) == ("http://x:1", 'a"b')
    settings.set("user_token", "new")
    settings.set("default_image", "it's: #1")
    settings.set("agent_address", None)
    assert file.read_text() == "# mine\nother:\n  - nested: 1\nuser_token: new\ndefault_image: 'it''s: #1'\n"
    assert config.load().values == {"user_token": "new", "default_image": "it's: #1"}


VALUES = ["x", "http://h:1/", "a b", "'", '"', "true", "12", "1.5", "- x", "#", "a #b", "@x", "é", "\\n", "~", "null"]
VALUES += ["=", "0x1f", "1e3", "{a}", "a: b", "a:", "'a' b", "1:30"]


@pytest.mark.parametrize("value", VALUES)
def test_written_values_are_yaml_and_come_back(environ: Path, value: str) -> None:
    config.load().set("default_image", value)
    assert config.load().get("default_image") == value
    assert yaml.safe_load((environ / ".beaker/config.yml").read_text()) == {"default_image": value}


def test_the_file_is_private_from_the_start(environ: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config.load().set("user_token", "x")
    file = environ / ".beaker/config.yml"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    file.chmod(0o644)
    assert config.load().token == "x"
    assert file.stat().st_mode & 0o777 == 0o600
    assert "other users could read the token" in capsys.readouterr().err


def test_a_linked_file_stays_a_link(environ: Path) -> None:
    (environ / ".beaker").mkdir()
    (environ / "dotfile").write_text("")
    (environ / ".beaker/config.yml").symlink_to(environ / "dotfile")
    config.load().set("user_token", "x")
    assert (environ / ".beaker/config.yml").is_symlink()
    assert (environ / "dotfile").read_text() == "user_token: x\n"


def test_the_environment_wins(environ: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = environ / "elsewhere.yml"
    other.write_text("user_token: file\nagent_address: http://file\n")
    other.chmod(0o600)
    monkeypatch.setenv("BEAKER_CONFIG", str(other))
    assert (config.load().token, config.load().address) == ("file", "http://file")
    monkeypatch.setenv("BEAKER_TOKEN", "env")
    monkeypatch.setenv("BEAKER_ADDR", "http://env/")
    assert (config.load().token, config.load().address) == ("env", "http://env")


@pytest.mark.parametrize("line", ["user_token: 'open", "user_token: [a]", "user_token: |"])
def test_a_broken_line_is_named(environ: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    (environ / ".beaker").mkdir()
    (environ / ".beaker/config.yml").write_text(f"default_org: x\n{line}\n")
    assert main.run(["account", "token"]) == 64
    assert "config.yml: line 2: user_token: " in capsys.readouterr().err


def test_without_a_home_the_environment_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a uid that no account has
    monkeypatch.setenv("BEAKER_TOKEN", "env")
    assert config.load().token == "env"
    with pytest.raises(Error, match="no home directory") as caught:
        config.load().set("user_token", "x")
    assert caught.value.exit_code == 64


def test_a_token_is_set_from_standard_input_and_never_listed(environ: Path) -> None:
    command = [sys.executable, "-m", "beaker_sessions.cli", "config"]
    subprocess.run([*command, "set", "user_token"], input=b"from-stdin\n", check=True)
    assert (environ / ".beaker/config.yml").read_text() == "user_token: from-stdin\n"
    listed = subprocess.run([*command, "list"], capture_output=True, check=True, text=True).stdout
    assert "from-stdin" not in listed
    assert "(set)" in listed


# -- start-up


NUMBERS = strategies.integers() | strategies.floats(allow_nan=False, allow_infinity=False)
TEXT = strategies.text(strategies.characters())  # half surrogate pairs too: a command may hold any bytes
FRAMES = strategies.recursive(
    strategies.none() | strategies.booleans() | NUMBERS | TEXT,
    lambda inner: strategies.lists(inner) | strategies.dictionaries(TEXT, inner),
)


@given(FRAMES)
def test_frames_are_json(value: Any) -> None:
    assert json.loads(codec.dumps(value)) == value
    assert codec.loads(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["", "{", "[1,]", "{} {}", "nul", '"\n"', "{'a': 1}"])
def test_broken_frames_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec.loads(text)


@pytest.mark.parametrize("line", ["--version", "session create --quiet -- true"])
def test_the_fast_paths_import_nothing_slow(door: list[Any], monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv("BEAKER_TOKEN", "t")
    job = {"id": "J", "status": {}}
    door.append([{"event": "created", "job": job}, {"event": "ended", "exitCode": 0, "message": "", "job": job}])
    code = (
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); leave = os._exit\n"
        "os._exit = lambda code: (print(*sys.modules), sys.stdout.flush(), leave(code))\n"
        "from beaker_sessions.cli.main import main; main()"
    )
    result = subprocess.run([sys.executable, "-IS", "-c", code, *line.split()], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    modules = result.stdout.splitlines()[-1].split()
    slow = "asyncio http http.client pydantic argparse dataclasses yaml typing logging subprocess socket ssl inspect"
    slow += " contextlib json re enum functools collections"
    slow += " beaker_sessions.client beaker_sessions.model beaker_sessions.wire"
    assert not set(slow.split()) & set(modules)


def test_closed_standard_streams_are_no_trouble() -> None:
    command = f"{sys.executable} -m beaker_sessions.cli --version <&- >&- 2>&-"
    assert subprocess.run(["/bin/sh", "-c", command]).returncode == 0


def test_an_unexpected_failure_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "load", lambda: 1 / 0)
    assert main.run(["config", "list"]) == 70
    err = capsys.readouterr().err
    assert err == "beaker: unexpected ZeroDivisionError: division by zero; BEAKER_DEBUG=1 shows where\n"


def test_it_runs_on_python_3_9() -> None:
    """Every module of the command line compiles there; only annotations, which are never evaluated, may be newer."""
    for path in [ROOT / "beaker_sessions/errors.py", *(ROOT / "beaker_sessions/cli").glob("*.py")]:
        import ast

        ast.parse(path.read_text(), feature_version=(3, 9))
