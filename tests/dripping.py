"""A registry on loopback whose answers never come to an end, though something comes."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from typing import Any

CONFIG, LAYER = b"{}", b"layer" * 1000


def described(content: bytes) -> dict[str, Any]:
    return {"digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}


MANIFEST = json.dumps({"schemaVersion": 2, "config": described(CONFIG), "layers": [described(LAYER)]}).encode()


class Drip:
    """pause: seconds between two bytes of what drips: the blobs, or the manifest."""

    def __init__(self, pause: float = 0.2, chunked: bool = False, manifest: bool = False) -> None:
        self.over, self.begun = threading.Event(), threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.send_response(200)
                dripping = ("/manifests/" in self.path) is manifest
                if chunked and dripping:
                    self.send_header("Transfer-Encoding", "chunked")
                else:
                    self.send_header("Content-Length", str(len(LAYER if "/blobs/" in self.path else MANIFEST)))
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
                    pass

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
