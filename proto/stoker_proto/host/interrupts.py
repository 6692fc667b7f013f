"""Ctrl-C and `kill -INT` end every command, however it was started."""

from __future__ import annotations

import signal


def heed_interrupts() -> None:
    """Makes SIGINT raise KeyboardInterrupt also where the process was started with SIGINT ignored; call it in the main thread.

    A shell without job control ignores SIGINT in what it starts with `&`, so do `nohup` scripts and many CI runners, and Python
    then installs no handler. A `kill -INT` would be lost without a word. Servers and other launchers (uvicorn, torchrun,
    DeepSpeed) heed it, so all processes of a run agree. A handler that is installed already stays.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
