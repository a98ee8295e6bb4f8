"""What set-up decides, and that it starts and stops exactly what it should. Its steps as a whole: `make session`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from setup import (
    archive,
    cuda,
    daemon,
    environment,
    host,
    packages,
    recipe,
    removal,
    services,
    steps,
    testing,
)
from setup.sources import sources

DYNAMIC, STATIC = b"\x7fELF /lib64/ld-linux-x86-64.so.2", b"\x7fELF"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def apt(tmp_path: Path, **files: str) -> Path:
    (tmp_path / "sources.list.d").mkdir()
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        path = tmp_path / "sources.list" if stem == "sources" else tmp_path / "sources.list.d" / f"{stem}.{suffix}"
        path.write_text(text)
    return tmp_path


def test_sources_of_both_formats_are_the_distributions_own(tmp_path: Path) -> None:
    directory = apt(
        tmp_path,
        sources_list=(
            "# deb http://old bookworm main\n"
            "deb http://mirror/debian bookworm main contrib # ours\n"
            f"deb [arch=amd64 signed-by={KEYRING}] http://mirror/security bookworm-security main\n"
            "deb-src http://mirror/debian bookworm main\n"
        ),
        debian_sources=(
            f"Types: deb deb-src\nURIs: http://mirror/debian\nSuites: bookworm bookworm-updates\n"
            f"Components: main\nSigned-By: {KEYRING}\n\n"
            "Types: deb\nEnabled: no\nURIs: http://off\nSuites: bookworm\nComponents: main\n"
        ),
        docker_list="deb http://docker bookworm stable\n",
        node_sources="Types: deb\nURIs: http://node\nSuites: nodistro\nComponents: main\n",
        note_txt="deb http://note bookworm main\n",
    )
    assert sources(directory, "bookworm") == [
        "deb http://mirror/debian bookworm main contrib",
        f"deb [arch=amd64 signed-by={KEYRING}] http://mirror/security bookworm-security main",
        f"deb [signed-by={KEYRING}] http://mirror/debian bookworm main",
        f"deb [signed-by={KEYRING}] http://mirror/debian bookworm-updates main",
    ]


def test_only_missing_steps_are_done(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def step(name: str, missing: bool) -> steps.Step:
        return steps.Step(name, lambda: missing, lambda _: done.append(name) or "made", as_owner=True)

    monkeypatch.setattr(host, "ROOT", Path("/proc/self"))  # this process's own
    steps.run([step("here", False), step("absent", True)])
    assert done == ["absent"]
    out, err = capfd.readouterr()
    assert out == "", "standard output belongs to the session's command"
    assert "absent … made" in err
    assert "here" not in err


def test_a_failed_command_tells_its_last_lines() -> None:
    with pytest.raises(steps.Failed, match="ended with 3") as failure:
        steps.command(["sh", "-c", "echo first; echo why >&2; exit 3"], lambda _: None)
    assert failure.value.lines == ("first", "why")


def test_launcher_starts_the_command_line_of_its_checkout(tmp_path: Path) -> None:
    script = tmp_path / "with space" / "beaker"
    script.parent.mkdir()
    script.write_text(environment.launcher(str(host.ROOT), os.path.realpath(sys.executable)))
    script.chmod(0o755)
    hostile = {**os.environ, "PYTHONPATH": "/nonexistent", "PYTHONHOME": "/nonexistent"}
    done = subprocess.run([script, "--version"], capture_output=True, text=True, env=hostile, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("beaker ")


def test_the_image_has_all_that_the_command_line_imports(tmp_path: Path) -> None:
    for path, content in recipe.files("command"):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    modules = [
        ".".join(path.relative_to(tmp_path / "beaker").with_suffix("").parts)
        for path in (tmp_path / "beaker/beaker_sessions").rglob("*.py")
    ]
    program = f"import sys, importlib; sys.path.insert(0, {str(tmp_path / 'beaker')!r})\n" + "\n".join(
        f"importlib.import_module({name!r})" for name in modules if not name.endswith("__main__")
    )
    done = subprocess.run([sys.executable, "-IS", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_archive_has_the_layers_that_its_configuration_names(tmp_path: Path) -> None:
    layers = [tmp_path / "base.tar", tmp_path / "top.tar"]
    for layer in layers:
        with tarfile.open(layer, "w") as tar:
            tar.add(__file__, layer.stem)
    archive.write(tmp_path / "image.tar", layers, "key")
    with tarfile.open(tmp_path / "image.tar") as tar:

        def read(name: str) -> bytes:
            file = tar.extractfile(name)
            assert file
            return file.read()

        (manifest,) = json.loads(read("manifest.json"))
        config = json.loads(read(manifest["Config"]))
        found = [hashlib.sha256(read(name)).hexdigest() for name in manifest["Layers"]]
    assert [f"sha256:{digest}" for digest in found] == config["rootfs"]["diff_ids"]
    assert found == [hashlib.sha256(layer.read_bytes()).hexdigest() for layer in layers]
    assert config["config"]["Labels"] == {"beaker.recipe": "key"}


@pytest.mark.parametrize(
    ("text", "value"),
    [("driver: docker\n", "docker"), ("driver: 'oci'  # why\n", "oci"), ("# driver: docker\n", "auto"), ("", "auto")],
)
def test_a_setting_is_read_without_yaml(text: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "SETTINGS", tmp_path / "config.yml")
    services.SETTINGS.write_text(text)
    assert services.setting("driver", "auto") == value


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("storagePath: /data/executor\nserver:\n  port: 8420\n", []),
        ("server:\n  storagePath: /data/a b  # why\nhostname: x\n", ['ReadWritePaths="-/data/a b"']),
        ("server:\n  storagePath: '/data/100%'\n", ['ReadWritePaths="-/data/100%%"']),
        ("server:\n  # or\n\n  database: sqlite:////srv/db/server.db\n", ['ReadWritePaths="-/srv/db"']),
        ("server:\n  database: postgresql://db/beaker\n", []),
        ("server:\n  key: /data/key/server.key\n", ['ReadWritePaths="-/data/key"']),
        ("server:\n  sockets: /run/lab/beaker\n", ['RuntimeDirectory="lab/beaker"']),
        ("server:\n  sockets: /srv/sockets\n", ['ReadWritePaths="-/srv/sockets"']),
        ("server:\n  storagePath: /home/lab/db\n", ['ReadWritePaths="-/home/lab/db"', "ProtectHome=read-only"]),
    ],
)
def test_the_server_may_write_where_its_settings_say(
    text: str, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "SETTINGS", tmp_path / "config.yml")
    plain = services.SERVER.unit_text().splitlines()
    services.SETTINGS.write_text(text)
    now = services.SERVER.unit_text().splitlines()
    assert [line for line in now if line not in plain] == lines
    assert [line for line in plain if line not in now] == []
    assert now.index("[Service]") < now.index((lines or ["UMask=0077"])[-1]) < now.index("[Install]")


def test_setup_imports_nothing_that_it_sets_up() -> None:
    program = "import sys, setup.__main__; print([name for name in sys.modules if name.startswith('beaker_sessions')])"
    done = subprocess.run([sys.executable, "-B", "-c", program], cwd=host.ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_dynamic_busybox_is_not_replaced_but_one_fetched_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its package would go, and the initramfs, which is made of it, be made anew."""
    theirs, ours, ran = tmp_path / "bin/busybox", tmp_path / "opt/busybox", []

    def command(argv: list[str], _report: steps.Report, cwd: Path = tmp_path, **_: object) -> None:
        ran.append(argv)
        if "download" in argv:
            Path(cwd, "busybox-static_1_amd64.deb").touch()
        if argv[0] == "dpkg-deb":
            host.write(Path(argv[-1], "bin/busybox"), STATIC.decode())

    monkeypatch.setattr(packages, "_BUSYBOX", theirs)
    monkeypatch.setattr(packages, "_OURS", ours)
    monkeypatch.setattr(packages, "command", command)
    theirs.parent.mkdir()
    theirs.write_bytes(DYNAMIC)
    step = packages.step("packages", {"coreutils": ("true",)})
    assert step.missing()
    assert str(ours) in step.do(lambda _: None)
    assert not [argv for argv in ran if "install" in argv]
    assert (ours.read_bytes(), ours.stat().st_mode & 0o777, theirs.read_bytes()) == (STATIC, 0o755, DYNAMIC)
    assert not step.missing()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pid files and logs in a directory of the test's own."""
    monkeypatch.setattr(host, "RUN", tmp_path / "run")
    monkeypatch.setattr(host, "LOGS", tmp_path / "log")


@pytest.mark.usefixtures("elsewhere")
def test_a_daemon_runs_on_logs_and_is_stopped() -> None:
    number = daemon.start("sleeper", ["sh", "-c", "echo started; exec sleep 60"])
    assert daemon.pid("sleeper") == number
    assert os.getsid(number) == number
    assert daemon.log("sleeper").stat().st_mode & 0o777 == 0o640
    steps.wait("its first line", lambda: bool(daemon.tail("sleeper")), lambda: daemon.alive(number))
    assert daemon.stop("sleeper")
    assert not daemon.alive(number)
    assert daemon.tail("sleeper") == ["started"]
    assert not daemon.stop("sleeper"), "nothing is left to stop"


@pytest.mark.usefixtures("elsewhere")
def test_another_process_with_that_pid_is_left_alone() -> None:
    other = subprocess.Popen(["sleep", "60"])
    try:
        host.write(host.RUN / "sleeper.pid", f"{other.pid} 1\n")
        assert daemon.pid("sleeper") is None
        assert not daemon.stop("sleeper")
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_secrets_have_their_mode_before_their_content(tmp_path: Path) -> None:
    host.write(tmp_path / "below/token", "secret", 0o600)
    assert (tmp_path / "below/token").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "below").iterdir()] == ["token"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze (package systemd)")
def test_units_are_valid(tmp_path: Path) -> None:
    programs = tmp_path / "100% of $HOME"
    programs.mkdir()
    for name in ("beaker", "beaker-server", "beaker-executor"):
        (programs / name).write_text("#!/bin/sh\n")
        (programs / name).chmod(0o755)
    units = []
    for service in (services.SERVER, services.EXECUTOR):
        for unit in service.units:
            units.append(tmp_path / unit.name)
            units[-1].write_text(service.unit_text(programs, unit.name))
    assert [unit.stem for unit in units] == ["beaker-server", "beaker-cgroup", "beaker-executor", "beaker-sessions"]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    assert "beaker" not in done.stderr, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_nothing_is_removed_through_a_mount(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home, below = tmp_path / "home", tmp_path / "state/session/home"
    home.mkdir()
    (home / "thesis").touch()
    below.mkdir(parents=True)
    subprocess.run(["mount", "--bind", home, below], check=True)
    try:
        removal._remove(tmp_path / "state")
        assert (home / "thesis").exists()
        assert str(below) in capsys.readouterr().err
    finally:
        subprocess.run(["umount", below], check=True)
    removal._remove(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_what_tests_leave_is_found_and_nothing_of_others(tmp_path: Path) -> None:
    """Two runs at once, as beside sessions of the machine: each finds its own."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    mine, theirs = (str(tmp_path / name) for name in ("mine", "theirs"))
    group = Path("/sys/fs/cgroup", "memory" if Path("/sys/fs/cgroup/memory").exists() else "")
    network = Path("/run/beaker/oci", testing.bridges(mine) + "x1", "networks", "7")
    group /= "beaker-" + mine.strip("/").replace("/", "-").replace("_", "-") + "-state"
    left = subprocess.Popen(["sleep", "60"], env={**os.environ, testing.MARK: mine})
    try:
        for place in (Path(mine, "layer"), network):
            place.mkdir(parents=True)
            subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
        group.mkdir()
        found = testing._left(mine, seconds=0)
        assert sorted(line.split()[0] for line in found) == ["control", "mount", "mount", "process"], found
        assert f"process {left.pid}: sleep 60" in found
        assert testing._left(theirs, seconds=0) == []
    finally:
        left.kill()
        left.wait()
        group.rmdir()
        for place in (Path(mine, "layer"), network):
            subprocess.run(["umount", place], check=True)
        shutil.rmtree(network.parents[1])
    assert testing._left(mine, seconds=0) == []


PROPRIETARY = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Mar  7 22:00:00 UTC 2024\nGCC version: 12.2.0\n"
OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\nGCC version: 12.2.0\n"
)


@pytest.mark.parametrize(
    ("driver", "tag"),
    [
        ("550.54.15", "12.4.1"), ("550.54.14", "12.4.1"), ("550.40.07", "12.3.2"), ("535.183.01", "12.2.2"),
        ("570.26", "12.8.1"), ("580.65.06", "13.0.1"), ("999.1", "13.0.1"), ("520.61.05", "11.8.0"),
    ],
)  # fmt: skip
def test_the_newest_cuda_that_the_driver_runs(driver: str, tag: str) -> None:
    for text in (PROPRIETARY, OPEN):
        assert cuda.choose(text.format(driver)) == f"nvidia/cuda:{tag}-runtime-ubuntu22.04"


def test_a_driver_that_no_cuda_runs_on_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(steps.Failed, match=r"470\.82\.01 is older than 520\.61\.5"):
        cuda.choose(PROPRIETARY.format("470.82.01"))
    with pytest.raises(steps.Failed, match="BASE="):
        cuda.choose("")
    monkeypatch.setattr(cuda, "VERSION", tmp_path / "none")
    with pytest.raises(steps.Failed, match="no NVIDIA driver is loaded"):
        cuda.base()


def test_what_is_left_out_of_the_image_is_said_at_the_end() -> None:
    said: list[str] = []
    listener = recipe.Listener(said.append)
    listener("installing")
    listener("left out: uv (nothing could be downloaded from PyPI)")
    assert said == ["installing", "left out: uv (nothing could be downloaded from PyPI)"]
    assert listener.left_out() == "; left out: uv (nothing could be downloaded from PyPI)"


def test_what_a_layer_is_made_of_changes_its_key_and_no_lower_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(recipe.DIRECTORY, tmp_path / "images")
    monkeypatch.setattr(recipe, "DIRECTORY", tmp_path / "images")
    monkeypatch.setattr(recipe, "_offered", lambda _: True)

    def keys() -> list[str]:
        return [recipe.base_key(), recipe.tools_key(), recipe.key()]

    before = keys()
    for file, changed in (("command/bashrc", 1), ("tools/install.sh", 2), ("base/packages.txt", 3)):
        with (tmp_path / "images" / file).open("a") as opened:
            opened.write("\nextra\n")
        after = keys()
        assert [a != b for a, b in zip(before, after, strict=True)] == [n >= 3 - changed for n in range(3)]
        before = after


def test_cleaning_leaves_what_else_is_where_images_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`imagePath: /data` had `make clean` remove /data/storage, /data/images and /data/run, whosever they were."""
    mine, others = tmp_path / "beaker-images/storage", [tmp_path / name for name in ("storage", "images", "run")]
    for path in (mine, *others):
        path.mkdir(parents=True)
    monkeypatch.setattr(services, "SETTINGS", tmp_path / "config.yml")
    services.SETTINGS.write_text(f"imagePath: {tmp_path}\n")
    removal._remove_images()
    assert not mine.parent.exists()
    assert all(path.exists() for path in others)


def test_systemd_forgets_units_that_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[list[str]] = []
    monkeypatch.setattr(host, "SYSTEMD", True)
    monkeypatch.setattr(services, "UNITS", tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: done.append(command))
    services.EXECUTOR.unit.touch()
    services.EXECUTOR.remove_units()
    assert not list(tmp_path.iterdir())
    assert [command[-1] for command in done] == [services.EXECUTOR.unit.name, "daemon-reload"]
    services.EXECUTOR.remove_units()
    assert len(done) == 2
