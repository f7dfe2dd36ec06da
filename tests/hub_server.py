"""A Hugging Face Hub on this computer: a few files, and the answers the real one gives."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_dummy"  # noqa: S105
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What it holds, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Content by `organisation/name/file`."""
    gated: set[str] = field(default_factory=set)
    seconds: float = 0.0
    """How long it waits before each answer."""
    ignores_ranges: bool = False
    url: str = ""
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Path, `Range` and `Authorization` of each request."""
    sent: int = 0
    """Bytes of all answers."""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serves `hub` on a free port of the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(self, hub)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _answer(request: BaseHTTPRequestHandler, hub: Hub) -> None:
    span = request.headers.get("Range", "")
    hub.asked.append((request.path, span, request.headers.get("Authorization", "")))
    time.sleep(hub.seconds)
    match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", unquote(request.path)) or (
        re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)\?recursive=true(.*)", request.path)
    )
    model, revision, file = match.groups() if match else ("", "", "")
    known = {"/".join(name.split("/")[:2]) for name in hub.files}
    if model in hub.gated:
        return _send(request, hub, 403, b"", {"X-Error-Code": "GatedRepo"})
    if model not in known:
        return _send(request, hub, 404, b"", {"X-Error-Code": "RepoNotFound"})
    if revision not in ("main", COMMIT):
        return _send(request, hub, 404, b"", {"X-Error-Code": "RevisionNotFound"})
    if request.path.startswith("/api/"):
        return _send(request, hub, 200, _tree(hub, model), {"Content-Type": "application/json"})
    body = hub.files.get(f"{model}/{file}")
    if body is None:
        return _send(request, hub, 404, b"", {"X-Error-Code": "EntryNotFound"})
    headers = {"X-Repo-Commit": COMMIT, "ETag": '"1"'}
    if not span or hub.ignores_ranges:
        return _send(request, hub, 200, body, headers)
    start, end = (int(n) for n in span.removeprefix("bytes=").split("-"))
    part = body[start : end + 1]
    headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(body)}"
    return _send(request, hub, 206, part, headers)


def _tree(hub: Hub, model: str) -> bytes:
    """The list of a model's files, as the Hub gives it."""
    files = [name for name in hub.files if name.startswith(f"{model}/")]
    listed = [
        {
            "type": "file",
            "path": name.removeprefix(f"{model}/"),
            "oid": COMMIT,
            "size": len(hub.files[name]),
        }
        for name in files
    ]
    return json.dumps(listed).encode()


def _send(
    request: BaseHTTPRequestHandler, hub: Hub, status: int, body: bytes, headers: dict[str, str]
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    if request.command == "GET":
        try:
            request.wfile.write(body)
            hub.sent += len(body)
        except OSError:
            request.close_connection = True
