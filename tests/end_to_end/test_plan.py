"""`loader-bench --plan` against a real loader, and its model against loaders of known speed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.fleet import Loader, run_program, serving, write_config, write_demonstrations
from tests.support.slowness import slowness
from trainer.bench.capacity import Measured, fit
from trainer.bench.null_loader import NullLoader

RATE = 60.0
SAMPLES, ROWS = 4800, 8


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    demos = write_demonstrations(folder / "demos", [40] * (SAMPLES // 40))
    return write_config(folder, model, [demos], order={"lanes": 16, "window_records": 2, "cell": 8})


@pytest.fixture(scope="module")
def loader(config: Path) -> Iterator[Loader]:
    with serving(config) as loader:
        yield loader


def bench(config: Path, addresses: list[str], *options: str) -> tuple[str, dict[str, Any]]:
    connect = [word for address in addresses for word in ("--connect", address)]
    sizes = ["--set", f"trainer.micro_batch_size={ROWS}", "--set", f"trainer.global_batch_size={ROWS}"]
    done = run_program(
        "trainer.bench.command", "--config", str(config), *connect, *sizes, "--json", *options, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def test_a_plan_of_a_real_loader(config: Path, loader: Loader) -> None:
    text, plan = bench(config, [loader.address], "--plan", "--gpus", "8,64", "--rate", "5", "--batches", "100")
    assert "what binds at 8, 64 GPUs: " in text
    assert [each["gpus"] for each in plan["needs"]] == [8, 64]
    assert plan["measured"]["num_loaders"] == 1
    assert plan["measured"]["num_threads"] >= 1
    assert plan["model"]["rank_samples_per_s"] > 0
    small, large = plan["needs"]
    assert large["network_gbit"] == pytest.approx(8 * small["network_gbit"])
    assert large["network_gbit"] == pytest.approx(320 * plan["model"]["wire_bytes"] * 8 * 1.05 / 1e9)


def test_a_plan_says_what_it_needs(config: Path) -> None:
    done = run_program("trainer.bench.command", "--config", str(config), "--connect", "tcp://127.0.0.1:1", "--plan")
    assert done.returncode == 1
    assert "--rate is None: --plan needs the samples per second of one GPU, above 0" in done.stderr


@pytest.mark.slow  # loaders of known speed sleep: a minute of wall time
def test_the_model_predicts_one_to_eight_loaders_within_a_tenth(config: Path, loader: Loader) -> None:
    """Fitted to one loader of 60 rows/s. In epoch 1, where all lanes begin at the same time."""
    before, found = slowness(), {}
    for count in (1, 2, 4, 8):
        with ExitStack() as stack:
            loaders = [stack.enter_context(NullLoader(loader.address, rows_per_s=RATE)) for _ in range(count)]
            options = ("--epoch", "1", "--batches", str(64 * count), "--set", "trainer.feed.prefetch=16")
            addresses = [each.address for each in loaders]
            if count == 1:
                plan = bench(config, addresses, "--plan", "--gpus", "8", "--rate", "5", *options)[1]
            found[count] = bench(config, addresses, *options)[1]["samples_per_s"]
    # The loaders sleep: whatever else this machine does is no limit of theirs.
    measured = replace(Measured(**plan["measured"]), host_busy=0.0)
    model = fit(measured, plan["model"]["rank_samples_per_s"], lanes=16)
    predicted = {count: model.samples_per_s(count, 1) for count in found}
    print(f"predicted {predicted}, measured {found}")
    assert model.loader_limit == "pace"
    assert predicted[8] == pytest.approx(8 * RATE, rel=0.1)
    if max(before, slowness()) > 8:
        pytest.skip("this machine is too busy for rates by the wall clock")
    assert {count: pytest.approx(rate, rel=0.1) for count, rate in predicted.items()} == found
