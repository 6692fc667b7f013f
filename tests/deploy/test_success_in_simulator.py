"""`make success` for real and tiny: interrupted while it collects and while it trains, the same command goes on from there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.success import ROOT
from tests.trainer.sim.conftest import collector, simulator

__all__ = ["collector", "simulator"]  # fixtures

DEADLINE_S = 1500
pytestmark = [
    pytest.mark.process,
    pytest.mark.simulator,
    pytest.mark.usefixtures("simulator"),
    pytest.mark.timeout(4 * DEADLINE_S),
]


class Run:
    """The command, with everything tiny: 12 steps, a checkpoint after each 4."""

    def __init__(self, work: Path, log: Path) -> None:
        self._log = log
        self._output = log.open("wb")
        arguments = {"task": "PushCube-v1", "demonstrations": 2, "validation": 1, "rounds": 1, "samples": 12 * 64}
        arguments |= {"checkpoint-interval": 4, "episodes": 1, "processes": 1, "ranks": 1, "work": work}
        named = [str(part) for name, value in arguments.items() for part in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [sys.executable, "deploy/success.py", *named],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto")])},
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def interrupt_when(self, condition: Callable[[], bool]) -> None:
        """Send SIGTERM to the command alone, and wait until it has ended."""
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)
        self._process.send_signal(signal.SIGTERM)
        assert self.end() == 130, self._log.read_text()

    def end(self) -> int:
        """Its exit code."""
        try:
            return self._process.wait(DEADLINE_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._output.close()


def identity(file: Path) -> tuple[int, int]:
    """Changes if the file is written again."""
    return file.stat().st_ino, file.stat().st_mtime_ns


def test_each_part_resumes_where_it_was_interrupted(tmp_path: Path) -> None:
    work, log = tmp_path / "work", tmp_path / "log"
    demonstrations = work / "data" / "PushCube-v1"
    Run(work, log).interrupt_when(lambda: (demonstrations / ".part-00000.done").exists())
    kept = identity(demonstrations / "part-00000.jsonl")
    assert not (work / "round-0").exists()
    Run(work, log).interrupt_when(lambda: any((work / "round-0" / "checkpoints").glob("step-*")))
    assert "(part-00000): done before" in log.read_text()
    assert identity(demonstrations / "part-00000.jsonl") == kept
    assert not (work / "round-0" / "export").exists()
    assert Run(work, log).end() == 0, log.read_text()
    found = re.search(r"training from step (\d+) to 12", log.read_text())
    assert found is not None
    assert 4 <= int(found[1]) <= 12, "from the checkpoint that SIGTERM asked for, or one after it"
    [episode] = json.loads((work / "evaluation" / "results.json").read_text())["episodes"]
    assert episode["seed"] == 1_000_000
    assert (work / "evaluation" / "index.html").is_file()
    exported = identity(work / "round-0" / "export" / "model.safetensors")
    assert Run(work, log).end() == 0, log.read_text()
    assert identity(work / "round-0" / "export" / "model.safetensors") == exported, "nothing is done twice"
    assert "Loaders and ZeRO ranks, round 0: done before" in log.read_text()
