"""A server that keeps repositories of models as the hub's interface for uploads does: small files
inside the commit, large ones through LFS.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = "hf_right"
_LARGE = ".safetensors"


@dataclass(kw_only=True)
class Hub:
    """What the server holds, and how it fails.

    Args:
        address: of the server.
        repositories: files of each, by path, in the newest commit.
        private: whether each is.
        objects: content of large files, by hash.
        refuses: paths that are answered with status 500.
    """

    address: str
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuses: str = ""

    def create(self, asked: dict) -> tuple[int, dict]:
        """Make a repository; 409 if it is there."""
        name = f"{asked['organization']}/{asked['name']}"
        address = {"url": f"{self.address}/{name}"}
        if name in self.repositories:
            return 409, address
        self.repositories[name] = {}
        self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        return 200, address

    def batch(self, asked: dict) -> dict:
        """Tell where large files go."""
        for each in asked["objects"]:
            each["actions"] = {"upload": {"href": f"{self.address}/upload/{each['oid']}"}}
        return {"transfer": "basic", "objects": asked["objects"]}

    def commit(self, name: str, lines: list[bytes]) -> dict:
        """Put a commit's files into a repository."""
        for line in map(json.loads, lines):
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.objects[value["oid"]]
            else:
                continue
            self.repositories[name][value["path"]] = content
        address = f"{self.address}/{name}/commit/" + "0" * 40
        return {"commitUrl": address, "commitOid": "0" * 40, "success": True}


def _mode(path: str) -> dict:
    """Tell how a file is uploaded."""
    mode = "lfs" if path.endswith(_LARGE) else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False}


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(404, {"error": "not found"})

        def do_PUT(self) -> None:
            content = self._body()
            assert hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
            hub.objects[self.path.rpartition("/")[2]] = content
            self._answer(200, {})

        def do_POST(self) -> None:
            body = self._body()
            if self.headers["Authorization"] != f"Bearer {TOKEN}":
                return self._answer(401, {"error": "Invalid username or password."})
            if hub.refuses and hub.refuses in self.path:
                return self._answer(500, {"error": "out of order"})
            name = "/".join(self.path.split("/")[3:5])
            if self.path == "/api/repos/create":
                return self._answer(*hub.create(json.loads(body)))
            if self.path == "/api/validate-yaml":
                yaml.safe_load(json.loads(body)["content"].split("---")[1])
                return self._answer(200, {"errors": [], "warnings": []})
            if "/preupload/" in self.path:
                files = [_mode(each["path"]) for each in json.loads(body)["files"]]
                return self._answer(200, {"files": files})
            if self.path.endswith("/info/lfs/objects/batch"):
                return self._answer(200, hub.batch(json.loads(body)))
            if "/commit/" in self.path:
                return self._answer(200, hub.commit(name, body.splitlines()))
            return self._answer(404, {"error": f"nothing at {self.path}"})

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers["Content-Length"] or 0))

        def _answer(self, status: int, answer: dict) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Write nothing."""

    return Handler


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    hub = Hub(address=f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass = _handler(hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hub
    server.shutdown()
