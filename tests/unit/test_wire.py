"""What comes from outside is understood, or refused with a line that says which field and why."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beaker_sessions import ids, model, wire
from beaker_sessions.errors import Error
from beaker_sessions.model import State

GIB = 1 << 30
calm = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine everything is slow
DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6.5GiB", 6979321856), ("512MB", 512_000_000), ("1024", 1024), (1024, 1024), ("0", 0), ("1 TiB", 1 << 40),
        ("8g", 8 * GIB), ("1k", 1024), ("1kB", 1000), ("17B", 17), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_sizes(text: Any, size: int) -> None:
    assert wire.parse_size(text) == size


NO_SIZES = [
    "5parsecs", "", "-1", -1, "1e9", "GiB", "1iB", "1.GiB", ".5GiB", "٣", "1GiB\n", [], True, 1.5, "9" * 30, "1025PiB"
]  # fmt: skip


@pytest.mark.parametrize("text", NO_SIZES)
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(Error) as caught:
        wire.request({"requests": {"memory": text}})
    assert caught.value.code == "invalid"
    assert caught.value.message.startswith("--memory: ")


def test_size_error_in_full() -> None:
    with pytest.raises(Error) as caught:
        wire.request({"requests": {"memory": "5parsecs"}})
    assert caught.value.message == "--memory: '5parsecs' is not a size, such as 6.5GiB or 512MB"
    assert caught.value.hint == "for example --memory 6.5GiB"


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"),
        (17, "17B"),
        (1024, "1KiB"),
        (62 * GIB + GIB // 2, "62.5GiB"),
        (67553994956, "62.9GiB"),
        (3 << 50, "3PiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert wire.format_size(size) == text


@calm
@given(st.integers(0, 1 << 60))
def test_sizes_for_programs_are_exact(size: int) -> None:
    assert wire.parse_size(wire.exact_size(size)) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("8h", 28800), ("90m", 5400), ("1h30m", 5400), ("1.5s", 1.5), ("2d", 172800), (10**9, 1), ("250ms", 0.25)],
)
def test_durations(text: Any, seconds: float) -> None:
    assert wire.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "8", "h", "-1h", "0s", 0, -1, "1w", "1h ", "100000h", None, True, 1.5, "1:30"])
def test_what_is_no_duration(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        wire.parse_duration(text)


@pytest.mark.parametrize(
    ("image", "kept"),
    [
        ({"docker": "debian"}, "debian"),
        ({"docker": "docker://debian:12"}, "debian:12"),
        ({"docker": "beaker-sessions/base"}, "beaker-sessions/base"),
        ({"docker": "localhost:5000/a/b_c:V1.0"}, "localhost:5000/a/b_c:V1.0"),
        ({"docker": f"ghcr.io/a/b-c:x@{DIGEST}"}, f"ghcr.io/a/b-c:x@{DIGEST}"),
        ({"docker": "[::1]:5000/a"}, "[::1]:5000/a"),
        ({"docker": DIGEST}, DIGEST),
        ({"beaker": "ann/torch"}, "beaker://ann/torch"),
        ({"beaker": "beaker://ann/torch"}, "beaker://ann/torch"),
        ({}, None),
    ],
)
def test_images(image: Any, kept: str | None) -> None:
    assert wire.request({"image": image}).image == kept


@pytest.mark.parametrize(
    ("session", "field"),
    [
        ({"uid": 0}, "uid"),
        ({"home": "/root"}, "home"),
        ({"devices": ["/dev/sda"]}, "devices"),
        ({"capAdd": ["SYS_ADMIN"]}, "capAdd"),
        ({"work_dir": "/"}, "work_dir"),
        ({"requests": {"gpus": 1}}, "requests.gpus"),
        ({"requests": {"gpuCount": -1}}, "--gpus"),
        ({"requests": {"gpuCount": "two"}}, "--gpus"),
        ({"requests": {"gpuCount": 1.5}}, "--gpus"),
        ({"requests": {"gpuCount": True}}, "--gpus"),
        ({"requests": {"cpuCount": float("inf")}}, "--cpus"),
        ({"requests": {"cpuCount": float("nan")}}, "--cpus"),
        ({"requests": {"cpuCount": -0.5}}, "--cpus"),
        ({"requests": {"cpuCount": "many"}}, "--cpus"),
        ({"requests": []}, "requests"),
        ({"name": "a\x1b[31m"}, "--name"),
        ({"name": "a\n"}, "--name"),
        ({"name": ""}, "--name"),
        ({"name": "a/b"}, "--name"),
        ({"name": "x" * 64}, "--name"),
        ({"workspace": "a/b/c"}, "--workspace"),
        ({"hostname": "a_b"}, "--hostname"),
        ({"hostname": "-a"}, "--hostname"),
        ({"hostname": "x" * 65}, "--hostname"),
        ({"command": "ls"}, "command"),
        ({"command": ["a", "b\0c"]}, "command.1"),
        ({"command": [1]}, "command.0"),
        ({"command": ["\ud800"]}, "command.0"),
        ({"envVars": [{"name": "A=B", "value": ""}]}, "--env"),
        ({"envVars": [{"name": "1A", "value": ""}]}, "--env"),
        ({"envVars": [{"name": "A", "value": "\0"}]}, "--env"),
        ({"envVars": [{"name": "A", "secret": "two words"}]}, "--secret-env"),
        ({"envVars": [{"name": "A", "secret": "x", "value": "y"}]}, "envVars.0"),
        ({"envVars": {"A": "B"}}, "envVars"),
        ({"datasets": [{}]}, "--secret-mount"),
        ({"datasets": [{"mountPath": "secrets/x", "source": {"secret": "x"}}]}, "--secret-mount"),
        (
            {"datasets": [{"mountPath": "/data", "source": {"secret": "x", "hostPath": "/"}}]},
            "datasets.0.source.hostPath",
        ),
        ({"saveImage": True}, "--save-image"),
        ({"ports": ["0"]}, "--port"),
        ({"ports": ["65536"]}, "--port"),
        ({"ports": ["22:22"]}, "--port"),
        ({"ports": ["0:80"]}, "--port"),
        ({"ports": ["80/udp"]}, "--port"),
        ({"ports": ["127.0.0.1:8000:80"]}, "--port"),
        ({"ports": [True]}, "--port"),
        ({"ports": [80, "8000:80"]}, "--port"),
        ({"ports": ["8000:80", "8000:81"]}, "--port"),
        ({"ports": [80], "hostNetworking": True}, "the request"),
        ({"image": {"docker": "A B"}}, "--image"),
        ({"image": {"docker": "debian:"}}, "--image"),
        ({"image": {"docker": "-v"}}, "--image"),
        ({"image": {"docker": "../x"}}, "--image"),
        ({"image": {"docker": "a" * 300}}, "--image"),
        ({"image": {"beaker": "a/b/c"}}, "--image"),
        ({"image": {"docker": "a", "beaker": "b"}}, "image"),
        ({"image": "debian"}, "image"),
        ({"workDir": "x"}, "--workdir"),
        ({"workDir": "/a/../b"}, "--workdir"),
        ({"workDir": "/a\0"}, "--workdir"),
        ({"priority": "max"}, "--priority"),
        ({"pull": "sometimes"}, "--pull"),
        ({"timeout": "long"}, "--timeout"),
        ({"bare": 1}, "bare"),
        ({"bare": "no"}, "bare"),
        ([], "the request"),
        (None, "the request"),
        ("x", "the request"),
    ],
)
def test_bad_requests(session: Any, field: str) -> None:
    with pytest.raises(Error) as caught:
        wire.request(session)
    assert caught.value.code == "invalid"
    assert caught.value.message.startswith(field + ":"), caught.value.message
    assert "\n" not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("door", [{"tty": 1}, {"stdin": None}, {"size": [24]}, {"size": ["a", 1]}, {"size": [-1, 80]}])
def test_bad_doors(door: Any) -> None:
    with pytest.raises(Error):
        wire.request({}, **door)


def test_absent_and_null_and_false_are_the_same() -> None:
    nothing = {
        "name": None,
        "datasets": [],
        "ports": None,
        "saveImage": False,
        "image": {},
        "requests": {},
        "bare": None,
    }
    assert wire.request(nothing, size=None) == wire.request({}) == model.Request()


def test_ports_are_the_sessions_and_the_nodes() -> None:
    request = wire.request({"ports": ["8000", 80, "8080:81"]})
    assert request.ports == ((8000, 0), (80, 0), (81, 8080))
    claim = model.Claim(ports=((8000, 32800), (80, 32801), (81, 8080)))
    now = datetime.now(UTC)
    session = model.Session(ids.ulid(), "ann", "", request, model.State.SCHEDULED, claim, created=now, scheduled=now)
    job = wire.job(session)
    assert job["portMappings"] == {"8000": 32800, "80": 32801, "81": 8080}
    assert job["session"]["ports"] == ["8000", "80", "8080:81"]
    assert wire.session(json.loads(json.dumps(job))) == session


def test_arguments_may_hold_any_bytes_but_nul() -> None:
    words = ["-c", "", " ", "\n\t\x1b", "é", "\udcff\udc80", "a" * 10_000]
    assert wire.request({"command": words}).command == tuple(words)


keys = st.sampled_from(
    [
        "requests",
        "memory",
        "name",
        "command",
        "envVars",
        "image",
        "docker",
        "session",
        "status",
        "limits",
        "timeout",
        "x",
    ]
)
anything = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner),
    max_leaves=20,
)


def refusal(function: Callable[[Any], object], data: Any) -> Error | None:
    try:
        function(data)
    except Error as error:
        return error
    return None


@calm
@given(anything)
def test_anything_is_understood_or_refused(data: Any) -> None:
    for function in (wire.request, wire.session, wire.resources):
        error = refusal(function, data)
        if error is not None:
            assert error.code == "invalid"
            assert "\n" not in error.message


argument = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0") | st.sampled_from("\udc80\udcff"))
name = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", fullmatch=True)
moment = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))
amount = st.integers(0, 1 << 50)
cores = st.floats(0, 999_999)
requests = st.builds(
    model.Request,
    name=st.none() | name,
    workspace=st.none() | name,
    image=st.sampled_from([None, "debian:12", "beaker://ann/torch", DIGEST]),
    pull=st.sampled_from(model.Pull),
    command=st.lists(argument).map(tuple),
    env=st.lists(st.tuples(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]*", fullmatch=True), argument)).map(tuple),
    gpus=st.none() | st.integers(0, 1000),
    cpus=st.none() | cores,
    memory=st.none() | amount,
    shared_memory=st.none() | amount,
    workdir=st.sampled_from([None, "/", "/home/ann"]),
    hostname=st.sampled_from([None, "gpu-1.lab"]),
    bare=st.booleans(),
    host_network=st.booleans(),
    timeout=st.none() | st.integers(1, 366 * 86400 * 1000).map(lambda milliseconds: milliseconds / 1000),
    priority=st.sampled_from(["low", "normal", "high", "urgent"]),
    tty=st.booleans(),
    stdin=st.booleans(),
    size=st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
)
PATHS = [  # the ways through `model.MOVES`
    [State.CREATED],
    [State.CREATED, State.SCHEDULED],
    [State.CREATED, State.SCHEDULED, State.STARTED],
    [State.CREATED, State.SCHEDULED, State.STARTED, State.EXITED],
    [State.CREATED, State.SCHEDULED, State.EXITED],
    [State.CREATED, State.SCHEDULED, State.EXITED, State.FINALIZED],
    list(State),
    [State.CREATED, State.FINALIZED],
]


@st.composite
def sessions(draw: st.DrawFn) -> model.Session:
    path = draw(st.sampled_from(PATHS))
    return model.Session(
        id=ids.ulid(),
        account=draw(name),
        node=draw(st.sampled_from(["", ids.ulid()])),
        request=draw(requests),
        state=path[-1],
        claim=draw(st.none() | st.builds(model.Claim, st.lists(name).map(tuple), cores, amount)),
        canceled=draw(st.none() | moment),
        canceled_for=draw(argument),
        exit_code=draw(st.none() | st.integers(0, 255)),
        message=draw(argument),
        revision=draw(st.integers(0, 1 << 62)),
        **{state.value: draw(moment) for state in path},
    )


@calm
@given(sessions())
def test_session_survives_the_wire(session: model.Session) -> None:
    job = json.loads(json.dumps(wire.job(session, cluster="lab/main", queuePosition=3, somethingNewer={"a": None})))
    assert wire.session(job) == session
    assert None not in job.values()
    assert job["id"] == session.id
    assert job["kind"] == "session"


def test_report_of_a_newer_executor_is_understood() -> None:
    session = model.Session(ids.ulid(), "ann", "", model.Request(), claim=model.Claim(("a=0",), 1.0, GIB))
    job = wire.job(session)
    job["session"]["colour"] = job["status"]["colour"] = job["limits"]["colour"] = "blue"
    assert wire.session(job) == session


def test_state_without_its_time_is_a_mistake_of_ours() -> None:
    session = model.Session(ids.ulid(), "ann", "", model.Request())
    with pytest.raises(ValueError, match="its times say created"):
        wire.job(replace(session, state=State.STARTED))


def test_limits() -> None:
    gpus = [model.Gpu("lab/gpu=0", "H200"), model.Gpu("lab/gpu=1", "H200")]
    limits = wire.limits(gpus, 7.5, 64 * GIB)
    assert limits == {
        "cpuCount": 7.5, "memory": "64GiB", "gpuCount": 2, "gpuType": "H200", "gpuIds": ["lab/gpu=0", "lab/gpu=1"]
    }  # fmt: skip
    whole = model.Resources(2, 7.5, 64 * GIB)
    assert wire.resources(limits) == whole == wire.resources(wire.free(whole))
