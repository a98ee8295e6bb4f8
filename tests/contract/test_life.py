"""Every driver: the life of a sandbox, from create to nothing left."""

from __future__ import annotations

import queue
import threading
from pathlib import Path

import pytest

from beaker_sessions.errors import Error
from beaker_sessions.model import Pull
from beaker_sessions.sandbox import LABEL, Status

from .conftest import ADA, SECONDS, Lab, Maker, pinned


def test_life_as_listed(make_any: Maker) -> None:
    sandboxes = make_any.lab.sandboxes
    spec = make_any.spec("false")
    sandboxes.create(spec)
    assert make_any.wait(spec.id, Status.CREATED).exit_code is None
    sandboxes.start(spec.id, None)
    found = make_any.wait(spec.id, Status.EXITED)
    assert (found.exit_code, found.labels[LABEL], found.pid, found.oom) == (1, spec.id, 0, False)
    assert found.started <= found.finished
    assert sandboxes.find(spec.id) == found
    sandboxes.remove(spec.id)
    assert sandboxes.find(spec.id) is None
    assert spec.id not in {found.id for found in sandboxes.list()}
    sandboxes.remove(spec.id)


def test_create_twice_is_a_conflict_and_harms_nothing(make_any: Maker) -> None:
    spec = make_any.spec("cat")
    stream = make_any.start(spec)
    with pytest.raises(Error) as error:
        make_any.lab.sandboxes.create(spec)
    assert error.value.code == "conflict"
    stream.write(b"still here\n")
    assert stream.read(b"still here\n")
    handle, terminal = make_any.lab.sandboxes.exec(
        spec.id, ("true",), env={}, identity=ADA, workdir="/", size=(10, 10), stdin=True
    )
    make_any.stream(terminal).read()
    assert make_any.lab.sandboxes.exec_exit(spec.id, handle) == 0


def test_watch_tells_of_starts_and_ends(make_any: Maker) -> None:
    sandboxes = make_any.lab.sandboxes
    seen: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=lambda: [seen.put(id) for id in sandboxes.watch()], daemon=True).start()
    assert seen.get(timeout=SECONDS) == ""
    spec = make_any.spec("true")
    sandboxes.create(spec)
    sandboxes.start(spec.id, None)
    while seen.get(timeout=SECONDS) != spec.id or make_any.wait(spec.id, Status.EXITED).exit_code != 0:
        pass


def test_another_instance_finds_what_runs(make_any: Maker) -> None:
    spec = make_any.spec("cat", tty=True)
    make_any.start(spec)
    pid = make_any.wait(spec.id, Status.RUNNING).pid
    sandboxes = make_any.lab.again()
    found = next(found for found in sandboxes.list() if found.id == spec.id)
    assert (found.status, found.pid, dict(found.labels)[LABEL]) == (Status.RUNNING, pid, spec.id)
    stream = make_any.stream(sandboxes.attach(spec.id, replay=False))
    stream.write(b"hello\n")
    stream.read(b"hello")


def test_exec_ends_with_its_code_and_belongs_to_its_sandbox(make_any: Maker) -> None:
    sandboxes = make_any.lab.sandboxes
    specs = [make_any.spec("cat"), make_any.spec("cat")]
    for spec in specs:
        make_any.start(spec)
    handle, terminal = sandboxes.exec(
        specs[0].id, ("false",), env={}, identity=ADA, workdir="/", size=None, stdin=False
    )
    make_any.stream(terminal).read()
    assert sandboxes.exec_exit(specs[0].id, handle) == 1
    with pytest.raises(Error) as error:
        sandboxes.exec_exit(specs[1].id, handle)
    assert error.value.code == "not_found"


def test_exec_in_what_has_ended_is_a_conflict(make_any: Maker) -> None:
    spec = make_any.spec("true")
    make_any.start(spec)
    make_any.wait(spec.id, Status.EXITED)
    with pytest.raises(Error) as error:
        make_any.lab.sandboxes.exec(spec.id, ("true",), env={}, identity=ADA, workdir="/", size=None, stdin=False)
    assert error.value.code == "conflict"


def test_what_has_ended_is_signalled_resized_and_stopped_in_silence(make_any: Maker) -> None:
    sandboxes = make_any.lab.sandboxes
    spec = make_any.spec("true", tty=True)
    make_any.start(spec)
    make_any.wait(spec.id, Status.EXITED)
    sandboxes.signal(spec.id, 15)
    sandboxes.resize(spec.id, (1, 1))
    sandboxes.stop(spec.id, 1)
    assert make_any.exit_code(spec.id) == 0


def test_attach_to_what_has_ended_gives_its_output_and_the_end(make: Maker) -> None:
    spec = make.spec("echo", "the end", stdin=False)
    make.start(spec).read()
    make.wait(spec.id, Status.EXITED)
    terminal = make.lab.sandboxes.attach(spec.id, replay=True)
    assert terminal.replay == b"the end\n"
    assert make.stream(terminal).read() == b""


def test_unknown_sandbox(any_lab: Lab) -> None:
    for call in (
        lambda: any_lab.sandboxes.attach("NOSUCH", replay=True),
        lambda: any_lab.sandboxes.start("NOSUCH", None),
        lambda: any_lab.sandboxes.logs("NOSUCH", 10),
    ):
        with pytest.raises(Error) as error:
            call()
        assert error.value.code == "not_found"


def test_unknown_image_is_named(any_lab: Lab) -> None:
    with pytest.raises(Error) as error:
        any_lab.sandboxes.image("no-such-image", Pull.NEVER, print)
    assert error.value.code == "not_found"
    assert "no-such-image" in error.value.message


def test_start_again_completes_and_never_repeats(make: Maker) -> None:
    """An executor that was killed in the middle of `start` calls it again."""
    spec = make.spec("sh", "-c", "echo ran; stty size 2>&1", tty=True, image="debian")
    make.lab.sandboxes.create(spec)
    stream = make.stream(make.lab.sandboxes.attach(spec.id, replay=False))
    make.lab.sandboxes.start(spec.id, (31, 99))
    make.lab.sandboxes.start(spec.id, (31, 99))
    assert stream.read() == b"ran\r\n31 99\r\n"
    make.wait(spec.id, Status.EXITED)
    make.lab.again().start(spec.id, (31, 99))
    assert make.wait(spec.id, Status.EXITED).exit_code == 0
    assert make.lab.sandboxes.logs(spec.id, 1000).count(b"ran") == 1


def test_interactive_bash_ends_when_asked(make: Maker) -> None:
    spec = make.spec(image="debian", tty=True)
    stream = make.start(spec)
    stream.write(b"echo $((40 + 2))\n")
    stream.read(b"42\r\n")
    make.lab.sandboxes.stop(spec.id, 30)
    assert make.wait(spec.id, Status.EXITED).exit_code == 128 + 1  # SIGHUP, not SIGKILL


def test_stop_kills_what_does_not_listen(make: Maker) -> None:
    spec = make.spec("sh", "-c", "trap '' TERM HUP; echo deaf; while :; do sleep 1; done", stdin=False)
    stream = make.start(spec)
    stream.read(b"deaf")
    make.lab.sandboxes.stop(spec.id, 0.2)
    assert make.exit_code(spec.id) == 128 + 9


def test_a_stop_in_the_first_moment_is_not_lost(make: Maker) -> None:
    """Else it would be killed at the end of the grace."""
    for _ in range(5):
        spec = make.spec("sleep", "1000", stdin=False)
        make.start(spec)
        make.lab.sandboxes.stop(spec.id, 5)
        assert make.exit_code(spec.id) == 128 + 15


def test_signal_reaches_the_command(make: Maker) -> None:
    spec = make.spec("sh", "-c", "trap 'echo got it; exit 5' INT; echo ready; while :; do sleep 0.1; done", stdin=False)
    stream = make.start(spec)
    stream.read(b"ready")
    make.lab.sandboxes.signal(spec.id, 2)
    assert stream.read().endswith(b"got it\n")
    assert make.exit_code(spec.id) == 5


def test_nothing_is_left(make: Maker, tmp_path: Path) -> None:
    state, mounts = make.lab.state, Path("/proc/self/mounts")
    tmp_path.joinpath("precious").write_text("kept")
    with pinned(tmp_path, "/data") as source:
        spec = make.spec("cat", mounts=(source,), tty=True)
        make.start(spec)
        handle, terminal = make.lab.sandboxes.exec(
            spec.id, ("true",), env={}, identity=ADA, workdir="/", size=(10, 10), stdin=True
        )
        make.stream(terminal).read()
        make.lab.sandboxes.exec_exit(spec.id, handle)
        unstarted = make.spec("cat", mounts=(source,))
        make.lab.sandboxes.create(unstarted)
        for id in (spec.id, unstarted.id):
            make.lab.sandboxes.remove(id)
    assert not [path for path in state.rglob("*") if spec.id in str(path) or unstarted.id in str(path)]
    assert str(state) not in mounts.read_text()
    assert tmp_path.joinpath("precious").read_text() == "kept"
