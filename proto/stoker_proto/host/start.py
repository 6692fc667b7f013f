"""How a launcher tells its ranks, which it started before the loaders were ready, where the loaders are.

    launcher: sender = StartSender()                  ranks:  start = wait_start(deadline_s)     # reads stdin
              Popen(..., stdin=sender.for_ranks)
              sender.send(Start(...)); sender.close()

The stdin of all ranks of a node is one end of a socket; the launcher holds the other end. It sends one message. A rank looks at
the message and leaves it there (MSG_PEEK), so every rank sees it. If the launcher gives up or dies first, ranks read an end
of file: no rank waits for a launcher that is gone. What a silent rank has printed lies in memory of which the launcher gets a
descriptor the other way, as a rank that crashes can show it no more. Linux only. See unix(7), recv(2).
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from stoker_proto.errors import DeadlineError

_MOST_BYTES = 1 << 20
_MOST_SHOWN_BYTES = 1 << 16
_LONGEST_SLEEP_S = 60.0  # select takes no infinite time-out as a number


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a rank cannot know before the loaders are ready."""

    loader_addresses: tuple[str, ...]
    master_port: int
    """Where the ranks meet. The port is chosen when they go there, as another program could take a port that waits for them."""


class StartSender:
    """The launcher's end. Close it to give up, or when ranks have nothing more to say."""

    def __init__(self) -> None:
        self._own, self.for_ranks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def send(self, start: Start) -> None:
        """Let the ranks begin."""
        self._own.send(json.dumps(asdict(start)).encode())

    def held_output(self) -> list[bytes]:
        """The newest 64 KiB of what each rank has printed and nobody has seen yet; without the empty ones."""
        found = []
        while select.select([self._own], [], [], 0)[0]:
            message, descriptors, _, _ = socket.recv_fds(self._own, 1, 16)
            for descriptor in descriptors:
                size = os.fstat(descriptor).st_size
                found.append(os.pread(descriptor, _MOST_SHOWN_BYTES, max(0, size - _MOST_SHOWN_BYTES)))
                os.close(descriptor)
            if not message:  # no rank is left
                break
        return [text for text in found if text]

    def close(self) -> None:
        """Close both ends here; the ranks keep theirs. A message that was sent can still be read."""
        self._own.close()
        self.for_ranks.close()


def share_output(descriptors: Sequence[int]) -> None:
    """Let the launcher read the files that hold this rank's output. Call it before `wait_start`."""
    with socket.socket(fileno=os.dup(0)) as to_launcher, suppress(ConnectionError):  # it is gone
        socket.send_fds(to_launcher, [b"o"], descriptors)


def wait_start(deadline_s: float) -> Start | None:
    """The launcher's message; None if the launcher gave up or died. Afterwards stdin is empty. Raises DeadlineError, and OSError
    where stdin is no such socket."""
    with socket.socket(fileno=os.dup(0)) as waiting:
        end = time.monotonic() + deadline_s
        while not select.select([waiting], [], [], max(0.0, min(end - time.monotonic(), _LONGEST_SLEEP_S)))[0]:
            if time.monotonic() >= end:
                raise DeadlineError(
                    f"the launcher has not said within {deadline_s:g} s that the loaders are ready: start the run again"
                )
        message = waiting.recv(_MOST_BYTES, socket.MSG_PEEK)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if not message:
        return None
    fields = json.loads(message)
    return Start(loader_addresses=tuple(fields["loader_addresses"]), master_port=fields["master_port"])
