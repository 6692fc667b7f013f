"""`make bench-peers`: its arithmetic, and a small run of our row, torch's and a peer that is not installed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.benchmarks.peers.table import summary, table
from trainer.models.tiny import build_tiny

BENCH = Path(__file__).parent / "peers/bench.py"
DEADLINE_S = 300.0


def one_round(**changes: Any) -> dict[str, Any]:
    figures = dict.fromkeys(
        ("cpu_ms", "consumer_cpu_ms", "second_epoch_cpu_ms", "second_epoch_consumer_cpu_ms",
         "second_run_cpu_ms", "samples_per_s", "ready_s", "ready_cpu_s",
         "first_batch_s", "resume_s", "resume_cpu_s", "peak_mb"), 1.0,
    )  # fmt: skip
    orders = {"order": "a", "order_again": "a", "order_of_second_half": "b", "resumed_order": "b"}
    return {
        **figures,
        **orders,
        "kinds_cpu_ms": {"consumer": 1.0},
        "samples": 8,
        "distinct": 8,
        "expected": 8,
        **changes,
    }


def test_rounds_become_medians_with_ranges() -> None:
    rounds = [one_round(cpu_ms=cost, kinds_cpu_ms={"loader": cost}) for cost in (0.9, 0.8, 1.3)]
    row = summary(rounds)
    assert row["cpu_ms"] == {"median": 0.9, "min": 0.8, "max": 1.3}
    assert row["kinds_cpu_ms"] == {"loader": {"median": 0.9, "min": 0.8, "max": 1.3}}
    assert (row["same_order"], row["resumes"], row["exact"]) == (True, True, True)
    shown = table({"A loader": row, "Another": {"reason": "not installed: no wheel"}}, markdown=True).splitlines()
    assert shown[2].startswith("| A loader | 0.90 (0.80-1.30) | 1.00 |")
    assert shown[3].startswith("| Another | not installed: no wheel |")


@pytest.mark.parametrize(
    ("change", "key"),
    [({"order": "z"}, "same_order"), ({"order_again": "z"}, "same_order"), ({"resumed_order": "z"}, "resumes"),
     ({"samples": 7}, "exact"), ({"distinct": 7}, "exact")],
)  # fmt: skip
def test_one_round_that_differs_is_enough(change: dict[str, Any], key: str) -> None:
    row = summary([one_round(), one_round(**change)])
    assert {name for name in ("same_order", "resumes", "exact") if not row[name]} == {key}


@pytest.mark.process
@pytest.mark.slow  # 25 CPU seconds: each loader is started three times
def test_a_small_run_measures_us_and_torch(tmp_path: Path) -> None:
    build_tiny("llava", tmp_path / "model", image_size=56)
    rows = "stoker,torch,spdl"
    command = [sys.executable, str(BENCH), "--trajectories", "2", "--rounds", "1", "--only", rows, "--own-environment"]
    command += ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "figures.json").read_text())
    rows_of_npz = report["rows"]["deflated NPZ"]
    assert rows_of_npz["spdl"]["reason"].startswith("failed in round 1: ModuleNotFoundError: No module named 'spdl'")
    for name, kind in (("stoker", "loader"), ("torch", "workers")):
        row, (figures,) = rows_of_npz[name], report["rounds"][name]
        assert (row["exact"], row["resumes"], row["same_order"]) == (True, True, True)
        assert figures["samples"] == figures["expected"] == 100
        assert min(row["kinds_cpu_ms"][kind]["median"], row["kinds_cpu_ms"]["consumer"]["median"]) > 0
        assert figures["peak_mb"] > 30
    assert report["versions"]["torch"]["simplejpeg"] == report["versions"]["stoker"]["simplejpeg"]


@pytest.mark.process
def test_an_interrupt_ends_everything_that_was_started(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH), "--trajectories", "8", "--only", "straight", "--own-environment"]
    with (tmp_path / "errors").open("w") as errors:
        run = psutil.Popen([*command, "--folder", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=errors)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not (below := [child for child in run.children(recursive=True) if "straight.py" in str(child.cmdline())]):
            assert time.monotonic() < deadline
            assert run.poll() is None, (tmp_path / "errors").read_text()
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        assert run.wait(DEADLINE_S) == 130
    finally:
        if run.poll() is None:
            run.kill()
    _, alive = psutil.wait_procs(below, timeout=DEADLINE_S)
    assert not alive
