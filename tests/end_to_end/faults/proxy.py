"""A TCP proxy that does harm on command: what a bad network, a dying switch or a confused middlebox does to a connection.

    with FaultyProxy("tcp://127.0.0.1:5555") as proxy:
        proxy.down.delay_s = 0.2          # from the loader to the rank
        proxy.half_open = True            # swallow everything in silence, close nothing
        proxy.cut()                       # break all connections; new ones are let through

Everything may be changed while bytes flow. A direction holds at most 64 chunks of 16 KiB; then it stops reading.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

_CHUNK = 16 * 1024
_QUEUED = 64


@dataclass
class Direction:
    """What happens to bytes on one of the two ways."""

    delay_s: float = 0.0
    rate: float = 0.0
    """Bytes per second; 0: no limit."""
    corrupt: float = 0.0
    """Chance that a chunk gets one flipped bit."""
    duplicate: float = 0.0
    """Chance that a chunk is sent twice."""
    truncate: float = 0.0
    """Chance that a chunk is sent in part, and the connection then ends."""
    bytes_seen: int = 0
    num_harmed: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def harm(self, chunk: bytes) -> tuple[bytes, bool]:
        """The bytes to send on, and whether the connection ends after them."""
        self.bytes_seen += len(chunk)
        if self.chance.random() < self.corrupt:
            self.num_harmed += 1
            at = self.chance.randrange(len(chunk))
            chunk = chunk[:at] + bytes([chunk[at] ^ 1 << self.chance.randrange(8)]) + chunk[at + 1 :]
        if self.chance.random() < self.duplicate:
            self.num_harmed += 1
            chunk += chunk
        if self.chance.random() < self.truncate:
            self.num_harmed += 1
            return chunk[: len(chunk) // 2], True
        return chunk, False

    def heal(self) -> None:
        """No harm any more."""
        self.delay_s = self.rate = self.corrupt = self.duplicate = self.truncate = 0.0


class FaultyProxy:
    """Listens on a free port of the loopback and passes on to one address; runs in a thread of its own."""

    def __init__(self, upstream: str) -> None:
        host, port = upstream.removeprefix("tcp://").split(":")
        self._upstream = host, int(port)
        self.up, self.down = Direction(), Direction()
        self.half_open = False
        """Take bytes and give none, in both directions."""
        self.refuse = False
        """End new connections at once."""
        self.num_connections = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self.address = ""

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()

    def cut(self) -> None:
        """Break every connection that stands now, as a reset does."""
        self._loop.call_soon_threadsafe(self._abort_all)

    def heal(self) -> None:
        """Let everything through again; connections that were harmed are broken, so that both sides notice."""
        self.up.heal()
        self.down.heal()
        self.half_open = self.refuse = False
        self.cut()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=_CHUNK)
        self.address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._listening.set()
        await self._stopping.wait()
        server.close()
        self._abort_all()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self._writers.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            if self.refuse:
                return
            from_there, there = await asyncio.open_connection(*self._upstream, limit=_CHUNK)
            self._writers.add(there)
            pumps = [
                asyncio.create_task(self._pump(reader, there, self.up)),
                asyncio.create_task(self._pump(from_there, writer, self.down)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            return  # nobody listens there, and the rank sees its connection end; or the proxy itself ends
        finally:
            for each in filter(None, (writer, there)):
                self._writers.discard(each)
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUED)
        sender = asyncio.create_task(self._send(queue, writer, way))
        try:
            while chunk := await reader.read(_CHUNK):
                await queue.put((self._loop.time() + way.delay_s, chunk))
                if sender.done():
                    return
            await queue.join()
        except OSError:
            return
        finally:
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await sender

    async def _send(
        self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: Direction
    ) -> None:
        while True:
            due, chunk = await queue.get()
            await asyncio.sleep(max(0.0, due - self._loop.time()))
            if way.rate:
                await asyncio.sleep(len(chunk) / way.rate)
            if not self.half_open:
                chunk, ends = way.harm(chunk)
                writer.write(chunk)
                await writer.drain()
                if ends:
                    writer.close()
                    return
            queue.task_done()
