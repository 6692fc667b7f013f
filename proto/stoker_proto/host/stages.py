"""How long the threads that build pieces spend in each stage: a clock per thread, which code deep inside a stage may switch.

    before = switch(INFLATE)
    ... the work ...
    switch(before)

A thread is in exactly one stage, so the seconds of all stages add up to the time in which it was busy. A thread without a clock
(`loader-prepare`, a test) pays one look-up. A switch takes a quarter of a microsecond: switch per image or per record, never
per row of pixels.
"""

from __future__ import annotations

import threading
from time import perf_counter

STAGES = ("read", "inflate", "decode", "resize", "encode", "tokenise", "pack")
"""Names of the stages, by number."""
READ, INFLATE, DECODE, RESIZE, ENCODE, TOKENISE, PACK = range(len(STAGES))
IDLE = len(STAGES)
"""Not a stage: the thread waits for work, or for room."""


class StageClock:
    """Seconds of one thread in each stage, up to its last switch. Other threads may read `seconds`."""

    __slots__ = ("seconds", "since", "stage")

    def __init__(self) -> None:
        self.seconds = [0.0] * (len(STAGES) + 1)
        """By stage; the last one is IDLE."""
        self.stage = IDLE
        self.since = perf_counter()


class _Local(threading.local):
    clock: StageClock | None = None


_local = _Local()


def start_clock() -> StageClock:
    """The clock of this thread, from now on."""
    _local.clock = clock = StageClock()
    return clock


def switch(stage: int) -> int:
    """This thread works on `stage` from now on. Returns the stage before, to switch back to."""
    clock = _local.clock
    if clock is None:
        return IDLE
    now = perf_counter()
    before = clock.stage
    clock.seconds[before] += now - clock.since
    clock.since, clock.stage = now, stage
    return before
