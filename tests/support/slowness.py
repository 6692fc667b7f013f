"""How slow the machine is just now, for bounds on what a user waits for."""

from __future__ import annotations

import time

_SAMPLE_S = 0.05


def slowness() -> float:
    """How many times its CPU time a bit of work takes: 1 on a quiet machine, 6 beside five busy loops per core.

    A bound of a quiet machine, times this, holds on a busy one too. It takes 0.05 s of CPU time.
    """
    began, cpu = time.monotonic(), time.thread_time()
    while (used := time.thread_time() - cpu) < _SAMPLE_S:
        pass
    return max(1.0, (time.monotonic() - began) / used)
