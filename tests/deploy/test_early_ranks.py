"""Real ranks that start before their loader is ready train the same as ranks that were given its address. Slow: 60 CPU s."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.end_to_end.fleet import ROOT, environment, serving, wait_until, write_config, write_demonstrations

START_S = 600.0
pytestmark = [pytest.mark.slow, pytest.mark.timeout(5 * START_S)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, one loader, nothing prepared."""
    folder = tmp_path_factory.mktemp("run")
    make = [sys.executable, "-m", "trainer.models.tiny", "--family", "llava", "--out", str(folder / "model")]
    subprocess.run(make, env=environment(), check=True, capture_output=True)
    path = write_config(folder, folder / "model", [write_demonstrations(folder / "data", [9] * 6)])
    tree = yaml.safe_load(path.read_text())
    tree["cluster"] = {"component_placement": {"trainer": "0-1", "dataloader": 0}}
    tree["model"]["precision"] = "fp32"
    tree["trainer"] |= {"export": False, "logger": {"tensorboard": False}}
    path.write_text(yaml.safe_dump(tree))
    return path


@contextmanager
def launched(config: Path, output: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    output.mkdir()
    command = [sys.executable, str(ROOT / "deploy" / "launch.py"), "--config", str(config), *options]
    command += ["--set", f"trainer.output_dir={output}", "--ready-deadline-s", str(START_S)]
    with (output / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment(DS_ACCELERATOR="cpu"), stdout=log, stderr=log, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(120)


def below(process: subprocess.Popen[str], program: str) -> list[psutil.Process]:
    """Programs of this name that the launcher has started."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        try:
            words = one.cmdline()
        except psutil.NoSuchProcess:
            continue
        if any(word.endswith(program) for word in words[1:3]):
            found.append(one)
    return found


def trained(output: Path) -> list[Any]:
    """Digests, losses and the name of the record, of both ranks."""
    return [
        [json.loads(line) for line in (output / f"digests-rank{rank}.jsonl").read_text().splitlines()]
        for rank in (0, 1)
    ]


def test_ranks_that_start_before_the_loader_is_ready_train_the_same(config: Path, tmp_path: Path) -> None:
    early, given = tmp_path / "early", tmp_path / "given"
    with launched(config, early) as process:
        wait_until(lambda: below(process, "loader_service.cli"), START_S, "the loader runs")
        (loader,) = below(process, "loader_service.cli")
        loader.send_signal(signal.SIGSTOP)  # as if it prepared for long
        wait_until(lambda: len(below(process, "trainer/main.py")) == 2, START_S, "both ranks run")
        assert "loader-serve ready" not in (early / "log").read_text()
        loader.send_signal(signal.SIGCONT)
        assert process.wait(START_S) == 0, (early / "log").read_text()[-3000:]
    with (
        serving(config) as loader_by_hand,
        launched(
            config, given, "--no-loaders", "--set", f"cluster.loader_addresses=[{loader_by_hand.address}]"
        ) as process,
    ):
        assert process.wait(START_S) == 0, (given / "log").read_text()[-3000:]
    assert [len(lines) for lines in trained(early)] == [7, 7]
    assert trained(early) == trained(given)
