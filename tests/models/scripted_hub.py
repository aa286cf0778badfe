"""A HuggingFace hub on loopback: listings and files of models over HTTP, as slowly and as badly as is wanted."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"
"""Files of this kind are kept apart, and known by their sha256."""


@dataclass
class ScriptedHub:
    """What the hub does. ``models`` has the files of each; ``url`` is where it listens; ``seconds`` how long a large file takes;
    ``cut`` names of files whose first transfer ends in the middle; ``token`` what it takes for one, ``asked`` what was asked."""

    models: Mapping[str, Mapping[str, bytes]]
    seconds: float = 0.0
    cut: set[str] = field(default_factory=set)
    token: str | None = None
    asked: list[str] = field(default_factory=list)
    url: str = ""

    def environment(self, home: Path) -> dict[str, str]:
        """For a process that uses this hub, with an empty cache in ``home``."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_"))}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def run(self, home: Path, code: str, **more: str) -> subprocess.Popen[str]:
        """Python with this hub."""
        return subprocess.Popen(
            [sys.executable, "-c", code],
            env=self.environment(home) | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def listing(self, model: str) -> list[dict[str, Any]]:
        return [
            {"name": name, "size": len(content), "oid": blob_of(name, content), "large": name.endswith(LARGE)}
            for name, content in self.models[model].items()
        ]  # fmt: skip


def blob_of(name: str, content: bytes) -> str:
    """Under which name the cache keeps a file."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve(hub: ScriptedHub) -> Iterator[ScriptedHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    cast("Any", server).hub = hub
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> ScriptedHub:
        return cast("ScriptedHub", cast("Any", self.server).hub)

    def log_message(self, format: str, *args: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            given = self.headers.get("Authorization", "")
            known = given == f"Bearer {self.hub.token}"
            self._json({"name": "ann"} if known else {"error": "no"}, 200 if known else 401)
            return
        for model, files in self.hub.models.items():
            api, content = f"/api/models/{model}", f"/{model}/resolve/{COMMIT}/"
            if path.startswith(f"{api}/tree/"):
                self._json([_tree_entry(one) for one in self.hub.listing(model)])
                return
            if path == api or path.startswith(f"{api}/revision/"):
                siblings = [_sibling(one) for one in self.hub.listing(model)]
                self._json({"id": model, "sha": COMMIT, "siblings": siblings})
                return
            if path.startswith(content) and path.removeprefix(content) in files:
                name = path.removeprefix(content)
                self._file(name, files[name], body=body)
                return
        self._json({"error": "nothing here"}, 404)

    def _json(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        self.wfile.write(content)

    def _file(self, name: str, content: bytes, *, body: bool) -> None:
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        rest = content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(rest)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{blob_of(name, content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not body:
            return
        pieces = 10
        size = max(1, -(-len(rest) // pieces))
        for number, start in enumerate(range(0, len(rest), size)):
            if name in self.hub.cut and number == pieces // 2:
                self.hub.cut.discard(name)
                self.close_connection = True
                return
            self.wfile.write(rest[start : start + size])
            if name.endswith(LARGE):
                time.sleep(self.hub.seconds / pieces)


def _sibling(one: Mapping[str, Any]) -> dict[str, Any]:
    lfs = {"sha256": one["oid"], "size": one["size"], "pointerSize": 134}
    extra = {"lfs": lfs, "blobId": "0" * 40} if one["large"] else {"blobId": one["oid"]}
    return {"rfilename": one["name"], "size": one["size"], **extra}


def _tree_entry(one: Mapping[str, Any]) -> dict[str, Any]:
    lfs = {"oid": one["oid"], "size": one["size"], "pointerSize": 134}
    extra = {"lfs": lfs, "oid": "0" * 40} if one["large"] else {"oid": one["oid"]}
    return {"type": "file", "path": one["name"], "size": one["size"], **extra}
