"""Trainer-bound or data-bound, the log line, GPU memory, and the profile of some steps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from stoker_proto.config import ProfileConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run
from trainer import loop
from trainer.report.data_wait import Interval, line_of, verdict_of
from trainer.training.flops import peak_of


@pytest.mark.long
def test_the_verdict_says_by_how_much() -> None:
    assert verdict_of(0.0, 0.0).startswith("trainer-bound: 0.0% of the time is waiting")
    assert verdict_of(0.49, 10.0).startswith("trainer-bound: 4.9% of the time is waiting")
    assert verdict_of(5.0, 10.0) == (
        "data-bound: 50.0% of the time is waiting for data, so steps would be 2.00 times as fast with enough loaders"
    )
    assert verdict_of(10.0, 10.0).endswith("deliver nearly nothing")


def test_an_interval_forgets_the_one_before() -> None:
    interval = Interval()
    interval.add(1.0, 2.0)
    interval.add(0.0, 2.0)
    assert interval.end()[0] == 0.25
    interval.add(0.0, 2.0)
    share, verdict = interval.end()
    assert (share, verdict.partition(":")[0]) == (0.0, "trainer-bound")


def test_lines_have_half_a_minute_between_them_but_the_last_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("trainer.report.data_wait.time.monotonic", lambda: now[0])
    interval = Interval()
    assert interval.is_line_due(is_last=False)
    now[0] = 129.0
    assert not interval.is_line_due(is_last=False)
    assert interval.is_line_due(is_last=True)
    now[0] = 159.5
    assert interval.is_line_due(is_last=False)


def test_the_line_names_gpu_memory_and_mfu_where_they_are_known() -> None:
    figures = {"train/loss": 1.5, "train/samples_per_s": 10.0, "train/tokens_per_s": 1000.0}
    assert line_of(figures, "v") == "loss 1.5000, 10.0 samples/s, 1000 tokens/s; v"
    known = figures | {"train/mfu": 0.412, "train/gpu_memory_gb": 71.26}
    assert line_of(known, "v") == "loss 1.5000, 10.0 samples/s, 1000 tokens/s, MFU 41.2%, 71.3 GB of GPU memory; v"


def test_devices_are_known_by_their_whole_names() -> None:
    names = ("NVIDIA L4", "NVIDIA L40", "NVIDIA L40S", "NVIDIA A10", "NVIDIA A10G", "NVIDIA H100 PCIe", "NVIDIA H200")
    assert [peak_of(name) for name in names] == [121e12, 181e12, 362e12, 125e12, None, 756e12, 989e12]


def profiled_run(rank: int, model: Path, output: Path) -> Any:
    """Files of the profile, log lines, and figures of each step."""
    config = make_config(model, output, export=False, epochs=1, profile=ProfileConfig(start=2, stop=4))
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loop.log.addHandler(handler)
    loop.log.setLevel(logging.INFO)
    loop.peak_memory_gb = lambda device: 3.25 + rank  # as if each rank had a GPU
    trainer = build_run(config, images=False)
    logged: list[dict[str, float]] = []

    def keep(figures: Any, step: int) -> None:
        if "train/loss" in figures:  # else a validation's
            logged.append(dict(figures))

    trainer.trackers.log = keep  # type: ignore[method-assign]
    summary = trainer.run()
    return sorted(path.name for path in (output / "profile").iterdir()), lines, logged, summary["verdict"]


@pytest.mark.process
def test_a_run_says_where_it_stands_and_profiles_the_steps_that_were_asked_for(
    tiny_causal: Path, tmp_path: Path
) -> None:
    [(files, lines, logged, verdict), _] = run_ranks(2, lambda rank: profiled_run(rank, tiny_causal, tmp_path))
    assert files == ["steps-2-4.json", "steps-2-4.txt"], "the first rank's alone"
    trace = json.loads((tmp_path / "profile" / "steps-2-4.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    assert "Self CPU" in (tmp_path / "profile" / "steps-2-4.txt").read_text()
    assert [figures["train/gpu_memory_gb"] for figures in logged] == [4.25] * 4, "of the rank that takes most"
    assert logged[-1]["train/interval_data_wait_frac"] == 0.0
    own = [line for line in lines if "bound:" in line]
    assert own[0].startswith("step 1: loss ")
    assert own[-1].startswith("step 4: loss ")
    assert "4.2 GB of GPU memory; trainer-bound: 0.0% of the time is waiting for data" in own[-1]
    assert verdict.startswith("trainer-bound: 0.0%")


def test_a_profile_of_no_step_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, profile=ProfileConfig(start=5, stop=5))
    with pytest.raises(
        ConfigError, match=r"trainer\.profile is the steps from 5 to before 5, which are none: raise stop"
    ):
        config.check()
