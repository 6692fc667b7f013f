"""A small HTTP server for operators: pages made by functions, for a scraper, a probe or a browser.

    pages = Pages({"/livez": lambda: Page(200, "ok\\n")})
    address = pages.start("127.0.0.1:9100")        # HOST:PORT; port 0: any
    pages.close()

It only answers GET of exactly these paths, one request per connection. A 17th connection ends the oldest of the others.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from stoker_proto.errors import ConfigError
from stoker_proto.host.names import look_up_host

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    status: int
    text: str | bytes
    content_type: str = "text/plain; charset=utf-8"


def parse_host_port(address: str, flag: str) -> tuple[str, int]:
    """(host, port) of `HOST:PORT` or `[IPv6]:PORT`. Raises ConfigError that names the flag."""
    host, colon, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 65536) or "/" in host:
        raise ConfigError(f"{flag} {address!r}: HOST:PORT is expected, e.g. {flag} 127.0.0.1:9100")
    return host, int(port)


class Pages:
    """Serves pages from its own threads. So a page's function may be called at any time and must be quick."""

    def __init__(self, pages: Mapping[str, Callable[[], Page]]) -> None:
        self._pages = dict(pages)
        self._server: _Server | None = None

    def start(self, address: str, flag: str) -> str:
        """Listen. Returns HOST:PORT. Raises ConfigError where that cannot be; flag: named in the message.

        Beyond loopback a warning says who can read the pages."""
        host, port = parse_host_port(address, flag)
        try:
            found = look_up_host(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            self._server = _Server(found[0][0], found[0][4], self._pages)
        except OSError as error:
            raise ConfigError(f"{flag} {address}: {error.strerror or error}: choose another host or port") from error
        bound = self._server.server_address
        if not ipaddress.ip_address(str(bound[0]).partition("%")[0]).is_loopback:
            logger.warning(
                "%s %s: any machine that reaches this port can read %s: these pages need no key and show no data; "
                "127.0.0.1:%d would keep them on this machine",
                flag,
                address,
                " and ".join(self._pages),
                bound[1],
            )
        thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="stoker-pages", daemon=True)
        thread.start()
        return f"[{bound[0]!s}]:{bound[1]}" if ":" in str(bound[0]) else f"{bound[0]!s}:{bound[1]}"

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, family: int, address: Any, pages: Mapping[str, Callable[[], Page]]) -> None:
        self.address_family, self.pages = family, pages
        self._open: OrderedDict[int, socket.socket] = OrderedDict()  # the oldest first
        self._lock = threading.Lock()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= _AT_ONCE:  # peers that hold connections must not shut a probe out
                _, oldest = self._open.popitem(last=False)
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[id(request)] = request
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(id(request), None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(error := sys.exception(), ConnectionError):  # many load balancers end a health check with a reset
            logger.debug("a connection from %s ended: %s", client_address, error)
        else:
            logger.info("a request from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _TIMEOUT_S
    server: _Server
    server_version, sys_version = "stoker", ""

    def do_GET(self) -> None:
        make = self.server.pages.get(self.path.partition("?")[0])
        page = Page(404, f"there is {', '.join(self.server.pages)}\n") if make is None else self._made(make)
        content = page.text if isinstance(page.text, bytes) else page.text.encode()
        self.send_response(page.status)
        self.send_header("Content-Type", page.content_type)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    @staticmethod
    def _made(make: Callable[[], Page]) -> Page:
        try:
            return make()
        except Exception:  # the thread's edge: a bug in a page must not look like a program that is gone
            logger.exception("a page could not be made")
            return Page(500, "the page could not be made; see the log\n")

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
