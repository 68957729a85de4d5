"""A model hub on the loopback: Hugging Face's API and ModelScope's, with faults by script and a log of every request.

Large files are redirected to a second port, as the real hub redirects to its CDN. A fault is queued for the requests
whose path contains its `match`; each request takes the first that fits, and when none is left, the hub is well.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import random
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = 64 * 1024  # from this size on a file is "LFS": hashed by sha256, served by the CDN


@dataclass
class Fault:
    """What goes wrong. With `status`, the whole answer; with `after`, the body ends there by FIN or (`reset`) RST."""

    match: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None
    reset: bool = False
    body: bytes | None = None  # other content of the same length, hashes in the listing unchanged
    ignore_range: bool = False
    wait: threading.Event | None = None  # answer only once this is set


@dataclass(frozen=True)
class Seen:
    """One request: `start` is where its Range began, `sent` how many body bytes went out."""

    method: str
    path: str
    start: int
    authorization: str | None
    sent: int = 0

    @property
    def file(self) -> str:
        """The repository's file that was asked for, empty for a listing."""
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        if parts[0] == "cdn":
            return "/".join(parts[3:])
        if parts[2:3] == ["resolve"]:
            return "/".join(parts[4:])
        return parse_qs(url.query).get("FilePath", [""])[0]


class LoopbackHub:
    """`repos` maps a repository to its files; `commit` is what `main` and `master` stand for."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commit = "c0ffee" + "0" * 34
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.token: str | None = None  # when set, every request needs it
        self._lock = threading.Lock()
        self._servers = [_server(self), _server(self)]

    @property
    def url(self) -> str:
        """The hub's address, for HF_ENDPOINT or MODELSCOPE_ENDPOINT."""
        return f"http://127.0.0.1:{self._servers[0].server_port}"

    @property
    def cdn(self) -> str:
        """Where large files come from."""
        return f"http://127.0.0.1:{self._servers[1].server_port}"

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def note(self, seen: Seen) -> None:
        with self._lock:
            self.seen.append(seen)

    def fault_for(self, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.match in path:
                    self.faults.remove(fault)
                    return fault
        return None

    def bodies(self, name: str) -> list[Seen]:
        """The requests that got (a part of) one file, in order."""
        return [s for s in self.seen if s.sent and s.file == name]

    def sent(self, name: str | None = None) -> int:
        """Body bytes of one file, or of all, that left the hub, over all requests."""
        return sum(s.sent for s in self.seen if s.file and name in (None, s.file))


@contextlib.contextmanager
def loopback_hub() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    try:
        yield hub
    finally:
        hub.close()


def checkpoint(folder: Path, *, shards: tuple[int, ...] = (), seed: int = 1) -> dict[str, bytes]:
    """A servable repository: the demo model's files, or its config with random shards of about the given sizes."""
    files = {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "demo.json"}
    files["README.md"] = b"# a model card, never fetched"
    files["pytorch_model.bin"] = b"\x80\x04never fetched"
    files["onnx/model.onnx"] = b"never fetched"
    files["1_Pooling/config.json"] = json.dumps({"pooling_mode_lasttoken": True}).encode()
    files["modules.json"] = json.dumps([{"type": "sentence_transformers.models.Pooling"}]).encode()
    if shards:
        del files["model.safetensors"]
        source = random.Random(seed)
        weight_map = {}
        for i, size in enumerate(shards, 1):
            name = f"model-{i:05}-of-{len(shards):05}.safetensors"
            files[name] = safetensors(source.randbytes(size), f"weight{i}")
            weight_map[f"weight{i}"] = name
        files["model.safetensors.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def safetensors(content: bytes, name: str = "weight") -> bytes:
    """One tensor of bytes in the safetensors format."""
    header = json.dumps({name: {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
    return struct.pack("<Q", len(header)) + header + content


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _server(hub: LoopbackHub) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        fault = self.hub.fault_for(self.path) or Fault("")
        if fault.wait:
            fault.wait.wait(30)
        if fault.status:
            self._answer(fault.status, b"no", fault.headers)
        elif self.hub.token and self._token() != self.hub.token and not self.path.startswith("/cdn/"):
            self._answer(401, b"no", {})
        else:
            self._route(fault)

    def _token(self) -> str | None:
        given = self.headers.get("Authorization")
        return given.removeprefix("Bearer ") if given else None

    def _route(self, fault: Fault) -> None:
        url = urlsplit(self.path)
        parts = unquote(url.path).strip("/").split("/")
        query = parse_qs(url.query)
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            self._tree("/".join(parts[2:4]))
        elif parts[:2] == ["api", "models"]:
            self._listing("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif parts[:3] == ["api", "v1", "models"]:
            self._modelscope("/".join(parts[3:5]), parts[5:], query, fault)
        elif parts[0] == "cdn":
            self._content("/".join(parts[1:3]), "/".join(parts[3:]), fault)
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]), fault)
        else:
            self._answer(200 if self.path == "/" else 404, b"", {})

    def _listing(self, repo: str, revision: str) -> None:
        files = self.hub.repos.get(repo)
        if files is None:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if revision not in ("main", self.hub.commit):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = []
        for path, content in files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"sha256": _sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        body = {"id": repo, "modelId": repo, "sha": self.hub.commit, "siblings": siblings, "tags": [], "downloads": 0}
        self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _tree(self, repo: str) -> None:
        entries = []
        for path, content in self.hub.repos[repo].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def _modelscope(self, repo: str, rest: list[str], query: dict[str, list[str]], fault: Fault) -> None:
        files = self.hub.repos.get(repo)
        if files is None or query.get("Revision", ["master"])[0] != "master":
            self._answer(404, json.dumps({"Code": 404, "Message": "not found"}).encode(), {})
        elif rest == ["repo", "files"]:
            entries = [
                {
                    "Path": path,
                    "Size": len(content),
                    "Sha256": _sha256(content),
                    "Type": "blob",
                    "Revision": self.hub.commit,
                    "CommittedDate": 1749000000,
                }
                for path, content in files.items()
            ]
            self._answer(200, json.dumps({"Code": 200, "Data": {"Files": entries}}).encode(), {})
        else:
            self._content(repo, query["FilePath"][0], fault)

    def _resolve(self, repo: str, path: str, fault: Fault) -> None:
        content = self.hub.repos.get(repo, {}).get(path)
        if content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": self.hub.commit}
        if len(content) < LARGE:
            self._content(repo, path, fault, {**headers, "ETag": f'"{git_sha1(content)}"'})
            return
        linked = {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        self._answer(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{repo}/{path}"})

    def _content(self, repo: str, path: str, fault: Fault, headers: dict[str, str] | None = None) -> None:
        content = self.hub.repos[repo][path] if fault.body is None else fault.body
        start, given = 0, self.headers.get("Range")
        if given and not fault.ignore_range:
            start = int(given.removeprefix("bytes=").split("-")[0])
        if start >= len(content) > 0:
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        partial = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self._answer(206 if start else 200, content[start:], {**(headers or {}), **partial}, fault, start)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str], fault: Fault | None = None, start: int = 0
    ) -> None:
        part = body if fault is None or fault.after is None else body[: fault.after]
        sent = len(part) if status in (200, 206) and fault is not None and self.command == "GET" else 0
        self.hub.note(Seen(self.command, self.path, start, self.headers.get("Authorization"), sent))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with contextlib.suppress(ConnectionError):
            self.wfile.write(part)
            if fault is not None and fault.reset:
                _reset(self.connection)


def _reset(connection: socket.socket) -> None:
    """Close by RST, once the peer's kernel holds every byte: what is cut is the connection, not the data."""
    until = time.monotonic() + 10
    while struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0\0\0\0"))[0] and time.monotonic() < until:
        time.sleep(0.001)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
