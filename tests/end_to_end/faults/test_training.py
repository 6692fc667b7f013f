"""A real DeepSpeed run on two ranks: a rank is killed, the loaders vanish; the same command goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from deploy.launch import trainer_command, trainer_environment
from tests.end_to_end.faults.conftest import Arena
from tests.end_to_end.faults.crew import Crew
from tests.end_to_end.fleet import environment, wait_until

START_S = 300.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7 * START_S)]


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA with weights."""
    folder = tmp_path_factory.mktemp("llava")
    command = [sys.executable, "-m", "trainer.models.tiny", "--family", "llava", "--out", str(folder)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def config(arena: Arena, llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared data set, trained on by two ranks; a checkpoint every ten steps."""
    tree = yaml.safe_load(arena.config.read_text())
    tree["model"] = {"base_model_path": str(llava), "precision": "fp32"}
    tree["trainer"] |= {
        "checkpoint": {"interval": 10},
        "export": False,
        "feed": {"prefetch": 2, "ticket_deadline_s": 1, "data_deadline_s": 3},
        "logger": {"tensorboard": False},
    }
    path = tmp_path_factory.mktemp("training") / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@contextmanager
def training(config: Path, output: Path, crew: Crew) -> Iterator[subprocess.Popen[str]]:
    """The launcher with its two ranks; all of them gone when the block ends."""
    common = ["--config", str(config), "--set", f"trainer.output_dir={output}"]
    command = trainer_command(common, crew.addresses, 2, None)
    output.mkdir(exist_ok=True)
    with (output / "log").open("a") as log:
        process = subprocess.Popen(
            command, env=trainer_environment(environment(), 2, None), stdout=log, stderr=log, text=True
        )
    try:
        yield process
    finally:
        for each in [*ranks_of(process), process]:
            each.kill()
        process.wait(60)


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The trainer processes, by rank."""
    try:
        children = psutil.Process(launcher.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found, words = {}, [""]
    for child in children:
        with contextlib.suppress(psutil.Error):  # it ended this moment
            words = child.cmdline()
        if any(word.endswith("trainer/main.py") for word in words[1:3]):
            found[next(word for word in words if word.startswith("--local_rank="))] = child
    return [found[name] for name in sorted(found)]


def lines(output: Path, rank: int) -> list[dict[str, Any]]:
    """Of digests-rank{r}.jsonl."""
    path = output / f"digests-rank{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until_step(output: Path, step: int) -> None:
    """Both ranks have done this step."""
    done = lambda rank: any(line["step"] >= step for line in lines(output, rank))  # noqa: E731
    wait_until(lambda: done(0) and done(1), START_S, f"step {step}")


def ended(launcher: subprocess.Popen[str], within_s: float) -> int:
    """The exit code; with the launcher all ranks must be gone."""
    ranks = ranks_of(launcher)
    code = launcher.wait(within_s)
    wait_until(lambda: not any(rank.is_running() for rank in ranks), 60, "the end of all ranks")
    return code


def test_a_killed_rank_and_vanished_loaders_cost_nothing_that_was_trained(
    arena: Arena, config: Path, tmp_path: Path
) -> None:
    """G1, G3, G6: no hang, a message, a non-zero exit; the lineage of checkpoints trains the undisturbed run's batches."""
    straight, disturbed = tmp_path / "straight", tmp_path / "disturbed"
    with Crew(config, 2) as crew:
        with training(config, straight, crew) as launcher:
            assert ended(launcher, START_S) == 0, (straight / "log").read_text()[-3000:]

        with training(config, disturbed, crew) as launcher:
            until_step(disturbed, 13)
            ranks_of(launcher)[1].send_signal(signal.SIGKILL)
            assert ended(launcher, START_S) != 0

        with training(config, disturbed, crew) as launcher:
            until_step(disturbed, 27)
            crew.kill(0)
            crew.kill(1)
            began = time.monotonic()
            assert ended(launcher, START_S) != 0
            print(f"all ranks had ended {time.monotonic() - began:.1f} s after the loaders (data_deadline_s: 3)")
        said = [line for line in (disturbed / "log").read_text().splitlines() if line.startswith("error (rank ")]
        assert said, (disturbed / "log").read_text()[-3000:]
        entry = yaml.safe_load(config.read_text())["data"]["train_data_paths"][0]
        for line in said:
            assert "no data for 3 s (trainer.feed.data_deadline_s)" in line
            assert f"held by no ready loader: entry 0, data.train_data_paths[0] ({entry})" in line
            assert all(address in line for address in crew.addresses)
            assert line.count("last heard of") == 2
            assert "the run resumes from its last checkpoint" in line

        crew.all_well()
        with training(config, disturbed, crew) as launcher:
            assert ended(launcher, START_S) == 0, (disturbed / "log").read_text()[-3000:]
    assert "resumed from" in (disturbed / "log").read_text()
    for rank in range(2):
        expected = {line["step"]: line for line in lines(straight, rank)}
        found = lines(disturbed, rank)
        assert {line["step"] for line in found} == set(expected)
        assert len(found) > len(expected), "steps after a checkpoint are trained again"
        for line in found:
            assert line == expected[line["step"]], "the batches, and the losses to their last digit"
