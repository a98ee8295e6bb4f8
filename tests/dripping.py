"""Registries on loopback as nobody wants them: one whose answers never come to an end, and one that says anything."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Callable
from typing import Any

CONFIG, LAYER = b"{}", b"layer" * 1000
TYPE = "application/vnd.oci.image.manifest.v1+json"
Answer = tuple[int, dict[str, str], bytes]  # status, headers, content


def described(content: bytes, kind: str = "layer.v1.tar") -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": digest, "size": len(content)}


def manifest(config: bytes, *layers: bytes, **more: Any) -> bytes:
    """The manifest of an image, whatever its parts are."""
    parts = {"config": described(config, "config.v1+json"), "layers": [described(layer) for layer in layers]}
    return json.dumps({"schemaVersion": 2, **parts, **more}).encode()


def image(config: bytes, *layers: bytes, **more: Any) -> Callable[[str, dict[str, str]], Answer]:
    """The answers of a registry that has one image under all names."""
    parts = {described(part)["digest"]: part for part in (config, *layers)}

    def answer(path: str, _: dict[str, str]) -> Answer:
        kind, _, name = path.rpartition("/")
        return (
            200,
            {"Content-Type": TYPE},
            parts[name] if kind.endswith("/blobs") else manifest(config, *layers, **more),
        )

    return answer


MANIFEST = manifest(CONFIG, LAYER)


class Server:
    """Answers as a function of path and headers says, and remembers what it was asked.

    halfway: called with the path when one byte of the content is sent.
    """

    def __init__(
        self, answer: Callable[[str, dict[str, str]], Answer], halfway: Callable[[str], None] = lambda _: None
    ) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers = dict(self.headers.items())
                outer.asked.append((self.path, headers))
                status, more, body = answer(self.path, headers)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **more}.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # who asked has left
                    self.wfile.write(body[:1])
                    self.wfile.flush()
                    halfway(self.path)
                    self.wfile.write(body[1:])

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Server:
        threading.Thread(target=self.http.serve_forever, args=[0.05], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class Drip:
    """pause: seconds between two bytes of what drips: the blobs, or the manifest. left: set when somebody hung up."""

    def __init__(self, pause: float = 0.2, chunked: bool = False, manifest: bool = False) -> None:
        self.over, self.begun, self.left = threading.Event(), threading.Event(), threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send_response(200)
                dripping = ("/manifests/" if manifest else "/blobs/") in self.path
                if chunked and dripping:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(LAYER if "/blobs/" in self.path else MANIFEST)))
                self.send_header("Content-Type", TYPE)
                self.end_headers()
                self.close_connection = True
                if not dripping:
                    self.wfile.write(MANIFEST)
                    return
                outer.begun.set()
                try:
                    while not outer.over.wait(pause):
                        self.wfile.write(b"0")
                        self.wfile.flush()
                except OSError:
                    outer.left.set()

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.http.server_address[1]}"

    def __enter__(self) -> Drip:
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()
