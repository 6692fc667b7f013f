"""`make test-busy`: the loops run beside the command and end with it, whatever happens."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.busy import LOOPS_PER_CORE

ROOT = Path(__file__).resolve().parents[2]
BUSY = [sys.executable, "-m", "tests.support.busy"]
pytestmark = pytest.mark.process


def test_the_exit_code_is_the_commands() -> None:
    done = subprocess.run([*BUSY, "sh", "-c", "exit 3"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "busy loops run beside: sh -c exit 3" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_loops_end_when_it_is_killed(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [*BUSY, "sh", "-c", "echo started; exec sleep 300"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    children = psutil.Process(process.pid).children()
    loops = [
        child for child in children if child.name() not in ("sh", "sleep")
    ]  # the command, before and after its exec
    process.send_signal(number)
    try:
        assert process.wait(60) == {signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
        assert len(loops) >= LOOPS_PER_CORE
        end = time.monotonic() + 60
        while any(loop.is_running() and loop.status() != psutil.STATUS_ZOMBIE for loop in loops):
            assert time.monotonic() < end, "a loop goes on"
            time.sleep(0.02)
    finally:
        for child in children:
            if child.is_running():
                child.kill()
        process.stdout.close()
