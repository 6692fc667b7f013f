"""A rank that was started before the loaders were ready: it prepares what needs no data, then waits for the launcher's word.

Until then it is silent. The launcher reports errors of the loaders. If loaders fail, the output of the ranks is not needed. A
rank's output is shown once the launcher has told it to begin. An error of its own is shown then too, but after 15 s at the
latest: loaders may prepare for hours. If the process crashes, the launcher shows what it had printed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from stoker_proto.errors import DeadlineError
from stoker_proto.host.start import Start, share_output, wait_start

_BLOCK_BYTES = 1 << 16
_KEEP_ERROR_S = 15.0
"""How long an error is kept. A loader that cannot start, for the same reason perhaps, says so in less."""


class HeldOutput:
    """Keeps what this process, also its libraries, writes to stdout and stderr in memory. Leaving the block drops what was not
    released."""

    def __enter__(self) -> Self:
        self._held: list[tuple[int, int, int]] = []
        """(1 or 2, a copy of the real one, the memory that stands in for it)."""
        for number in (1, 2):
            memory = os.memfd_create(f"held-output-{number}")
            self._held.append((number, os.dup(number), memory))
            os.dup2(memory, number)
        share_output([memory for _, _, memory in self._held])
        return self

    def release(self) -> None:
        """Write what was kept; from now on output goes where it belongs."""
        sys.stdout.flush()
        sys.stderr.flush()
        for number, real, memory in self._held:
            os.dup2(real, number)
            os.lseek(memory, 0, os.SEEK_SET)
            while block := os.read(memory, _BLOCK_BYTES):
                while block:
                    block = block[os.write(number, block) :]
            os.ftruncate(memory, 0)  # for the launcher: it has been shown
            os.close(real)
            os.close(memory)
        self._held = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, real, memory in self._held:
            os.dup2(real, number)
            os.close(real)
            os.close(memory)
        self._held = []


def prepare_and_wait(prepare: Callable[[], None], deadline_s: float) -> Start:
    """Call `prepare`, then wait for the launcher's message. Raises what `prepare` raised, but only after the message has come, or
    15 s later.

    Raises DeadlineError, and SystemExit where the launcher gave up or died: it has said why.
    """
    failure: Exception | SystemExit | None = None
    with HeldOutput() as output:
        try:
            prepare()
        except (Exception, SystemExit) as error:  # noqa: BLE001  (raised below, after the loaders' own errors)
            failure = error
        try:
            start = wait_start(deadline_s if failure is None else min(deadline_s, _KEEP_ERROR_S))
            if start is None:
                sys.exit(1)
        except DeadlineError as error:
            output.release()
            raise failure or error from None
        output.release()
    if failure is not None:
        raise failure
    return start
