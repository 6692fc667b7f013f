"""Run a command beside five busy loops per core: `python -m tests.support.busy COMMAND ...`. The exit code is the command's.

What a test waits for then comes many times later than on a quiet machine: a deadline that is too short shows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

LOOPS_PER_CORE = 5
LOOP = """
import os, sys
os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # under a real-time policy nobody else would run
while os.getppid() == int(sys.argv[1]):  # ends with its parent, however that ends
    for _ in range(1_000_000):
        pass
"""


def main(command: list[str]) -> int:
    """Run the command; the loops end before this returns."""
    if not command:
        print("usage: python -m tests.support.busy COMMAND ...", file=sys.stderr)
        return 2
    count = LOOPS_PER_CORE * len(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-S", "-c", LOOP, str(os.getpid())]) for _ in range(count)]
    try:
        print(f"{count} busy loops run beside: {' '.join(command)}", file=sys.stderr, flush=True)
        with subprocess.Popen(command) as process:

            def pass_on(number: int, _: FrameType | None) -> None:
                process.send_signal(number)

            signal.signal(signal.SIGTERM, pass_on)
            signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to the command, too
            code = process.wait()
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
