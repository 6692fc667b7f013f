"""The sockets: WebSocket connections to sessions, and the answers to health checks.

The model computes in one thread beside the event loop, one observation at a time, so that health checks and the closing of
connections never wait for it. Bounds: the size of a message, the number of connections, and one frame in work per connection (the
next ones stay in the kernel's buffers, so a client that sends faster has to wait).
"""

from __future__ import annotations

import asyncio
import hmac
import http
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from trainer.serving.session import Reply, Session

log = logging.getLogger(__name__)

HEALTH = {"/healthz": "OK\n", "/health": '{"status": "ok"}\n'}
"""Path -> answer with status 200, as the servers of openpi and of vla-eval give it."""
_PING_S, _PONG_S = 60.0, 600.0
"""A client that steps a slow simulator in its event loop answers no ping for minutes; one that vanished must free its place."""
_CLOSE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client, or all of them, may take."""

    message_bytes: int = 64 << 20
    connections: int = 16
    api_key: str | None = None
    """Clients must send it as `Authorization: Api-Key KEY`, as openpi-client does; None: no key is needed."""


class PolicyServer:
    """Serves sessions. Use `listening` inside an event loop."""

    def __init__(self, open_session: Callable[[], Session], limits: Limits) -> None:
        self._open_session, self._limits = open_session, limits
        self._num_connections = 0
        self._model = ThreadPoolExecutor(1, thread_name_prefix="model")

    @asynccontextmanager
    async def listening(self, host: str, port: int) -> AsyncIterator[int]:
        """Inside, clients are served; yields the port. Raises OSError where the address cannot be had.

        At its end connections are closed with code 1001; a prediction that runs is completed first.
        """
        async with serve(
            self._handle,
            host,
            port,
            process_request=self._screen,
            origins=[None],  # a web page in a browser of this machine must not move a robot
            compression=None,  # pictures do not get smaller, and unpacking needs a bound of its own
            max_size=self._limits.message_bytes,
            max_queue=1,
            ping_interval=_PING_S,
            ping_timeout=_PONG_S,
            close_timeout=_CLOSE_S,
        ) as server:
            yield _port_of(server)
        self._model.shutdown()

    def _screen(self, connection: ServerConnection, request: Request) -> Response | None:
        """None: the handshake may go on."""
        path = request.path.partition("?")[0]
        if path in HEALTH:
            response = connection.respond(http.HTTPStatus.OK, HEALTH[path])
            if path == "/health":
                del response.headers["Content-Type"]
                response.headers["Content-Type"] = "application/json"
            return response
        if not self._has_key(request):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "the API key is missing or wrong\n")
        if self._num_connections >= self._limits.connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, self._full + "\n")
        return None

    def _has_key(self, request: Request) -> bool:
        if self._limits.api_key is None:
            return True
        given = request.headers.get("Authorization", "").encode()
        return hmac.compare_digest(given, f"Api-Key {self._limits.api_key}".encode())

    @property
    def _full(self) -> str:
        return f"{self._limits.connections} clients are connected, which is the limit (--max-connections)"

    async def _handle(self, connection: ServerConnection) -> None:
        if self._num_connections >= self._limits.connections:  # several handshakes may have passed at once
            await connection.close(CloseCode.TRY_AGAIN_LATER, self._full)
            return
        self._num_connections += 1
        peer = connection.remote_address
        log.info("client %s connected (%d now)", peer, self._num_connections)
        try:
            await self._serve_session(connection)
        except ConnectionClosed as closed:
            log.info("client %s: %s", peer, closed)
        finally:
            self._num_connections -= 1
            log.info("client %s left", peer)

    async def _serve_session(self, connection: ServerConnection) -> None:
        session = self._open_session()
        await connection.send(session.greeting())
        loop = asyncio.get_running_loop()
        async for frame in connection:
            reply = await loop.run_in_executor(self._model, _answer, session, frame)
            if reply is None:
                continue
            await connection.send(reply.frame)
            if reply.closes:
                log.warning("client %s: %s", connection.remote_address, reply.frame)
                await connection.close(CloseCode.INTERNAL_ERROR, "the error stands in the frame before")
                return


def _answer(session: Session, frame: bytes | str) -> Reply | None:
    try:
        return session.answer(frame)
    except Exception as error:  # the edge of a request: a defect ends this connection, not the server
        log.exception("an observation could not be answered")
        return Reply(f"the server failed ({type(error).__name__}); its log has the reason", closes=True)


def _port_of(server: Server) -> int:
    port: int = next(iter(server.sockets)).getsockname()[1]
    return port
