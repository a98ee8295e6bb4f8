"""Where images come from without Docker Engine: a registry on loopback, an archive, and errors that say why not."""

from __future__ import annotations

import http.server
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from beaker_sessions.errors import Error
from beaker_sessions.model import Pull
from beaker_sessions.sandbox import Progress
from beaker_sessions.sandbox.oci.images import Images
from tests import images

from .conftest import SECONDS, DockerLab

pytestmark = pytest.mark.usefixtures("oci_lab")  # what images need, the lab needs


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a registry on loopback that has lab/tool:1."""
    program = shutil.which("docker-registry")
    if not program:
        pytest.skip("needs docker-registry")
    root = tmp_path_factory.mktemp("registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {"version": 0.1, "storage": {"filesystem": {"rootdirectory": str(root)}}, "http": {"addr": address}}
    (root / "registry.yml").write_text(yaml.safe_dump(settings))
    with open(root / "log", "wb") as log:
        process = subprocess.Popen([program, "serve", str(root / "registry.yml")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://{address}/v2/", timeout=5).close()
                break
            except urllib.error.URLError:
                assert time.monotonic() < deadline, (root / "log").read_text()
                time.sleep(0.02)
        images.oci_archive(images.alpine(), root / "tool.tar", ("TOOL=yes",))
        command = ["skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]
        subprocess.run([*command, f"oci-archive:{root}/tool.tar", f"docker://{address}/lab/tool:1"], check=True)
        yield address
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def store(tmp_path: Path) -> Images:
    return Images(tmp_path / "images")


def test_pull(store: Images, registry: str) -> None:
    seen: list[Progress] = []
    with pytest.raises(Error) as error:
        store.get(f"{registry}/lab/tool:1", Pull.NEVER, seen.append)
    assert (error.value.code, seen) == ("not_found", [])
    image = store.get(f"docker://{registry}/lab/tool:1", Pull.MISSING, seen.append)
    assert image.env == ("TOOL=yes",)
    assert seen[-1].layers == (1, 1)
    assert seen[-1].done == seen[-1].total > 0
    count = len(seen)
    assert store.get(f"{registry}/lab/tool:1", Pull.MISSING, seen.append).id == image.id
    assert len(seen) == count
    assert store.get(f"{registry}/lab/tool:1", Pull.ALWAYS, seen.append).id == image.id
    assert len(seen) > count
    assert str(store.root) not in Path("/proc/self/mountinfo").read_text()


def test_what_the_registry_does_not_have(store: Images, registry: str) -> None:
    for reference in (f"{registry}/lab/tool:2", f"{registry}/no/such"):
        with pytest.raises(Error) as error:
            store.get(reference, Pull.MISSING, print)
        assert error.value.code == "not_found"
        assert reference in error.value.message


def test_registry_that_is_away(store: Images) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # not listening, and nobody else can
        with pytest.raises(Error) as error:
            store.get(f"127.0.0.1:{held.getsockname()[1]}/a/b:1", Pull.MISSING, print)
    assert error.value.code == "unavailable"


def test_registry_that_wants_a_login(store: Images) -> None:
    class Closed(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="lab"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Closed) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(Error) as error:
            store.get(f"127.0.0.1:{server.server_address[1]}/a/b:1", Pull.MISSING, print)
        server.shutdown()
    assert error.value.code == "unauthorized"


def test_from_docker_engine(docker_lab: DockerLab, tmp_path: Path) -> None:
    lab = docker_lab
    theirs = lab.image("alpine")
    store = Images(tmp_path / "images", lab.socket)
    ours = store.get(theirs.reference, Pull.MISSING, print)
    assert ours.id == theirs.id
    archive = tmp_path / "changed.tar"
    archive.write_bytes(images.tar({"bin/busybox": images.BUSYBOX.read_bytes()}))
    query = {"fromSrc": "-", "repo": "alpine", "tag": lab.tag}
    lab.engine.call("POST", "/images/create", query, archive.read_bytes(), timeout=SECONDS)
    try:
        assert store.get(theirs.reference, Pull.MISSING, print).id != ours.id
    finally:
        lab.engine.call("POST", f"/images/{theirs.id}/tag", {"repo": "alpine", "tag": lab.tag})
