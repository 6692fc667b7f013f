"""A process that ends with the one that started it, however that ends."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Have Linux send this process a signal when its parent ends. Returns False if the parent has ended already: exit then.

    parent: process number of the parent, taken by the parent before it started this process. The kernel watches the thread that
    did so: start the process from a thread that lives as long as the parent. Raises OSError. Other systems than Linux cannot
    do this; there it does nothing and returns True.
    """
    if sys.platform != "linux":
        return True
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return os.getppid() == parent
