"""Bytes of any kind at the door, as frames and by the command line: a clear refusal, nothing made, nothing broken."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from tests.stack import Stack, User

# Sends each packet of its standard input over a connection of its own, and prints what is answered.
SEND = """
import base64, json, socket, sys
for packet in json.load(sys.stdin):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.settimeout(30)
        door.connect(sys.argv[1])
        door.sendall(base64.b64decode(packet))
        print(door.recv(1 << 17).decode() or "null")
"""
HOSTILE = {
    "nul": "a\0b", "newline": "a\nb", "return": "a\rb", "escape": "a\x1b]0;owned\x07b", "up": "../../etc/passwd",
    "absolute": "/etc/passwd", "bidi": "a\u202egnp.exe", "zero width": "a\u200bb", "half a pair": "a\ud800b",
    "high byte": "a\udcffb", "long": "a" * 70000, "space": "a b", "shell": "$(touch /tmp/owned);`id`|&",
    "dash": "--privileged",
    "empty": "", "percent": "%2e%2e%2fetc", "dots": "..", "colons": "a:b:c:ro", "comma": "a,upperdir=/etc",
    "null": None, "number": 7, "list": ["a"], "object": {"a": 1}, "true": True, "huge": 10**400, "minus": -1,
}  # fmt: skip


def ask(stack: Stack, user: User, *packets: bytes) -> list[Any]:
    text = json.dumps([base64.b64encode(packet).decode() for packet in packets]).encode()
    done = user.run("/usr/bin/python3", "-c", SEND, str(stack.socket), input=text)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def frame(user: User, op: str, **fields: Any) -> bytes:
    return json.dumps({"v": 1, "op": op, "token": user.token, **fields}).encode()


def refusals(stack: Stack, answers: list[Any]) -> list[str]:
    """The codes of answers that all refuse, on one clean line, without an incident."""
    for answer in answers:
        assert set(answer) == {"error"}, answer
        text = answer["error"]["message"] + (answer["error"].get("hint") or "")
        assert "incident" not in text
    assert not stack.live()
    assert not stack.sandboxes()
    return [answer["error"]["error"] for answer in answers]


@pytest.mark.parametrize(
    "field",
    [
        "image",
        "hostname",
        "name",
        "workDir",
        "workspace",
        "priority",
        "timeout",
        "envVars",
        "ports",
        "datasets",
        "command",
        "memory",
    ],
)
def test_a_field_of_any_value_is_refused(stack: Stack, ada: User, field: str):
    def session(value: Any) -> dict[str, Any]:
        place: dict[str, Any] = {
            "image": {"image": {"docker": value}},
            "envVars": {"envVars": [{"name": value, "value": "x"}]},
            "ports": {"ports": [value]},
            "datasets": {"datasets": [{"mountPath": value, "source": {"secret": "KEY"}}]},
            "memory": {"requests": {"gpuCount": 99, "memory": value}},
        }.get(field, {field: value})
        # More GPUs than there are, so that what the grammar lets pass is refused a moment later.
        return {"requests": {"gpuCount": 99}, **place}

    packets = [frame(ada, "create", session=session(value), tty=False, stdin=False) for value in HOSTILE.values()]
    codes = refusals(stack, ask(stack, ada, *packets))
    assert set(codes) <= {"invalid", "not_found", "forbidden"}, dict(zip(HOSTILE, codes, strict=True))


@pytest.mark.parametrize("op", ["attach", "exec", "stop", "get", "logs"])
def test_a_reference_to_a_session_of_any_value(stack: Stack, ada: User, op: str):
    packets = [frame(ada, op, id=value, command=["true"]) for value in HOSTILE.values()]
    assert set(refusals(stack, ask(stack, ada, *packets))) <= {"invalid", "not_found"}


def test_what_is_no_request(stack: Stack, ada: User):
    packets = [
        b"\0", b"\xff\xfe", b"[]", b"7", b'"create"', b"{", b"[" * 100_000, b'{"v": 1}', b'{"v": 1, "op": "__class__"}',
        b'{"v": 2, "op": "list"}', b'{"v": 1, "op": ["list"]}', b'{"v": 1, "op": "list", "token": {"a": 1}}',
        b"x" * 120_000,
        frame(ada, "create", session="x"), frame(ada, "create", session={"user": "root"}),
        frame(ada, "create", session={"uid": 0}), frame(ada, "create", session={}, size=[0, 10**9]),
        frame(ada, "create", session={}, key={"a": 1}), frame(ada, "exec", id=None, command=["a\0b"]),
    ]  # fmt: skip
    assert set(refusals(stack, ask(stack, ada, *packets))) <= {"invalid", "unauthorized", "not_found"}


def test_a_process_handle_of_any_value(stack: Stack, ada: User):
    id = ada.beaker("session", "create", "--gpus", "0", "--detach", "--", "sleep", "100").stdout.decode().strip()
    for value, answer in zip(
        HOSTILE, ask(stack, ada, *(frame(ada, "exec_exit", id=id, handle=h) for h in HOSTILE.values())), strict=True
    ):
        assert answer["error"]["error"] in ("not_found", "invalid"), (value, answer)
    assert ada.beaker("session", "exec", id, "--", "echo", "alive").stdout == b"alive\n"


@pytest.mark.parametrize("flag", ["--image", "--hostname", "--name", "--workdir", "--env", "--port", "--secret-mount"])
def test_the_command_line_refuses_on_one_clean_line(stack: Stack, ada: User, flag: str):
    for name in ("newline", "escape", "up", "bidi", "long", "high byte", "empty"):
        value = str(HOSTILE[name])
        done = ada.beaker("session", "create", "--gpus", "99", flag, value, "--", "true")
        assert done.returncode in (64, 66, 77), (name, done.stderr)
        assert not any(byte in done.stderr for byte in (b"\x1b", b"\x07", b"\r", "\u202e".encode())), (
            name,
            done.stderr,
        )
        assert len(done.stderr.splitlines()) <= 2, (name, done.stderr)
    assert not stack.live()
