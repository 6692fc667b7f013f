"""A folder over HTTP, with ETags and ranges, that can fail in the ways servers do, and counts what it is asked for."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


class HttpFiles:
    """What the server is told, and what it has seen. Paths are those of the URL, without the first slash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = defaultdict(list)
        """Path -> what becomes of its next GETs: "500", "403", "short" (too few bytes, and says so), "cut" (the connection ends
        in the body), "hang" (nothing comes until the server ends)."""
        self.ranges = True
        self.gets: Counter[str] = Counter()
        self.heads: Counter[str] = Counter()
        self.released = threading.Event()
        self.url = ""

    def url_of(self, name: str = "") -> str:
        return f"{self.url}/{name}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, files: HttpFiles, *arguments: object) -> None:
        self.files = files
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(is_head=True)

    def do_GET(self) -> None:
        self._answer(is_head=False)

    def _answer(self, *, is_head: bool) -> None:
        files, name = self.files, unquote(self.path).removeprefix("/")
        (files.heads if is_head else files.gets)[name] += 1
        faults = files.faults[name]
        fault = faults[0] if faults and (not is_head or faults[0].isdigit()) else ""
        if fault and not is_head:
            faults.pop(0)
        path = files.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_response(int(fault) if fault else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        tag, start, stop = hashlib.sha256(content).hexdigest()[:16], 0, len(content)
        wanted = self.headers.get("Range")
        if wanted and files.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1, len(content))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            self.send_response(200)
        body = content[start:stop]
        if fault == "short":
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{tag}"')
        self.end_headers()
        if is_head:
            return
        if fault == "hang":
            files.released.wait(600)
            self.close_connection = True
        elif fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """Clients that give up are part of the tests."""


@contextmanager
def http_files(folder: Path) -> Iterator[HttpFiles]:
    """Serve the folder until the block ends."""
    files = HttpFiles(folder)
    server = _Server(("127.0.0.1", 0), partial(_Handler, files))
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield files
    finally:
        files.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
