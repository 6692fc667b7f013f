"""Servers of the S3 and the GCS API on loopback, in this process: moto's and gcp-storage-emulator's. Each holds one bucket."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

BUCKET = "robots"
ACCESS_KEY, SECRET_KEY = "loopback", "loopback-only"


@dataclass
class BucketServer:
    """One bucket and the server in front of it."""

    protocol: str
    put: Callable[[str, bytes], None]
    """(key, content): write an object."""
    start: Callable[[], None]
    stop: Callable[[], None]
    """The outage: nobody listens on the port until `start`."""
    options: dict[str, Any] = field(default_factory=dict)
    """`data.remote.storage_options` for it."""
    refusing: Callable[[], AbstractContextManager[None]] = nullcontext
    """In the block the server takes the credentials for wrong ones."""

    def url(self, key: str = "") -> str:
        return f"{self.protocol}://{BUCKET}/{key}"

    def put_folder(self, folder: Path, key: str) -> None:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.put(f"{key}/{file.relative_to(folder).as_posix()}", file.read_bytes())


class _Listener:
    """A threading server that can end and begin again on the same port."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        """make: (port; 0: any) -> a socketserver that listens on 127.0.0.1."""
        self._make, self._server, self._thread = make, None, None
        self.port = 0

    def start(self) -> None:
        self._server = self._make(self.port)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None


@contextmanager
def s3_server() -> Iterator[BucketServer]:
    """moto's S3. The environment must hold ACCESS_KEY and SECRET_KEY."""
    import boto3
    from moto import settings
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = DomainDispatcherApplication(create_backend_app)
    listener = _Listener(lambda port: make_server("127.0.0.1", port, app, threaded=True, request_handler=_quiet()))
    listener.start()
    endpoint = f"http://127.0.0.1:{listener.port}"
    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SECRET_KEY, "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    client.create_bucket(Bucket=BUCKET)

    def put(key: str, content: bytes) -> None:
        client.put_object(Bucket=BUCKET, Key=key, Body=content)

    @contextmanager
    def refusing() -> Iterator[None]:
        before = settings.INITIAL_NO_AUTH_ACTION_COUNT
        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0  # moto checks keys and signatures, and knows no user
        try:
            yield
        finally:
            settings.INITIAL_NO_AUTH_ACTION_COUNT = before

    try:
        yield BucketServer("s3", put, listener.start, listener.stop, {"endpoint_url": endpoint}, refusing)
    finally:
        client.close()
        listener.stop()
        listener.start()  # moto keeps its buckets in the process
        _post(f"http://127.0.0.1:{listener.port}/moto-api/reset", b"")
        listener.stop()


@contextmanager
def gcs_server(folder: Path) -> Iterator[BucketServer]:
    """gcp-storage-emulator, with its objects in `folder`."""
    from functools import partial
    from http.server import ThreadingHTTPServer

    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=False, data_dir=str(folder))
    create_bucket(BUCKET, storage)
    refuses = threading.Event()

    class Handler(RequestHandler):  # type: ignore[misc]  # not typed
        """The emulator knows no credentials: what the real service answers to wrong ones."""

        def do_GET(self) -> None:
            if not refuses.is_set():
                super().do_GET()
                return
            body = b'{"error": {"code": 401, "message": "Invalid Credentials", "errors": [{"reason": "authError"}]}}'
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    listener = _Listener(lambda port: ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, storage)))
    listener.start()
    endpoint = f"http://127.0.0.1:{listener.port}"

    def put(key: str, content: bytes) -> None:
        name = quote(key, safe="")
        _post(f"{endpoint}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}", content)

    @contextmanager
    def refusing() -> Iterator[None]:
        refuses.set()
        try:
            yield
        finally:
            refuses.clear()

    try:
        options = {"endpoint_url": endpoint, "token": "anon"}
        yield BucketServer("gs", put, listener.start, listener.stop, options, refusing)
    finally:
        listener.stop()


def _post(url: str, content: bytes) -> None:
    request = urllib.request.Request(
        url, data=content, method="POST", headers={"Content-Type": "application/octet-stream"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


def _quiet() -> type:
    from werkzeug.serving import WSGIRequestHandler

    class Quiet(WSGIRequestHandler):
        def log(self, *_: object, **__: object) -> None:
            pass

    return Quiet
