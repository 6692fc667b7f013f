"""`loader-top` and the trainer's own line: each verdict made true with real loaders and a real client."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loader_service.top.command import main
from loader_service.top.fleet import FleetView, LoaderRow, TrainerRow
from loader_service.top.view import import_rich, render
from stoker_proto.errors import ConfigError
from stoker_proto.fleet.verdict import Verdict
from stoker_proto.host.ports import free_port
from tests.end_to_end.fleet import ROOT, environment, run_cli, serving, wait_until, write_config
from tests.end_to_end.paced_dataset import READ_S
from tests.end_to_end.test_metrics import has_metrics

DATASET = "tests.end_to_end.paced_dataset:Paced"


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A config over 4,000 records of one sample, in reading order, none of them ahead of need."""
    folder = tmp_path_factory.mktemp("paced")
    record = json.dumps({"samples": [["what is this?", "a cube"]], "tokens": 9}) + "\n"
    (folder / "questions.jsonl").write_text(record * 4000)
    config = write_config(
        folder,
        model,
        [folder / "questions.jsonl"],
        dataset_type=DATASET,
        order={"lanes": 8, "window_records": 8, "cell": 4},
    )
    run_cli("prepare", "--config", str(config))
    return config


@dataclass
class Running:
    """A fleet in the middle of an epoch."""

    ports: list[int]
    bench: subprocess.Popen[str]

    def look(self, *more: str, interval: float = 4.0) -> dict[str, Any]:
        """`loader-top --once --json` on all of it."""
        addresses = [f"127.0.0.1:{port}" for port in self.ports]
        done = run_cli("top", *addresses, "--once", "--json", "--interval", str(interval), *more)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found


@contextmanager
def running(config: Path, read_s: Sequence[float], *, step_ms: float, threads: int = 2) -> Iterator[Running]:
    """A loader for each time that reading takes, and a trainer without a model that is past its first steps."""
    with ExitStack() as stack:
        ports, connect = [], []
        for seconds in read_s:
            ports.append(free_port())
            options = ["--metrics", f"127.0.0.1:{ports[-1]}", "--set", f"loader.threads={threads}"]
            loader = stack.enter_context(serving(config, *options, **{READ_S: str(seconds)}))
            connect += ["--connect", loader.address]
        ports.append(free_port())
        command = [sys.executable, "-m", "trainer.bench.command", "--config", str(config), *connect]
        command += ["--step-time-ms", str(step_ms), "--metrics", f"127.0.0.1:{ports[-1]}"]
        bench = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, text=True)
        try:
            wait_until(lambda: has_metrics(ports[-1], "stoker_trainer_steps_total", 3), 180, "the first steps")
            yield Running(ports, bench)
        finally:
            bench.kill()
            bench.wait()


def verdicts(view: dict[str, Any]) -> dict[str, str]:
    return {verdict["kind"]: verdict["text"] for verdict in view["verdicts"]}


@pytest.mark.slow
def test_a_slow_trainer_is_what_limits_quick_loaders(paced: Path) -> None:
    """8 samples take 400 ms to train, and 8 x 0.01 / 2 s to read: loaders could give ten times as much."""
    with running(paced, [0.01], step_ms=400) as fleet:
        view = fleet.look()
    assert list(verdicts(view)) == ["trainer-bound"]
    match = re.fullmatch(r"trainer-bound: loaders could give (?:more than )?([\d.]+)x", verdicts(view)["trainer-bound"])
    assert match is not None
    assert float(match[1]) >= 1.5, "ten on a quiet machine"
    [loader], [trainer] = view["loaders"], view["trainers"]
    assert (loader["is_ready"], loader["ranks"], loader["error"]) == (True, 1, "")
    assert loader["samples_per_s"] > 0
    assert loader["memory_bytes"] > 20e6
    assert loader["cpu_cores"] > 0
    assert max(loader["stages"], key=loader["stages"].get) == "read"
    assert trainer["wait"] < 0.05
    assert [seen["share"] for seen in trainer["loaders"].values()] == [1]


def test_too_few_loaders_are_counted(paced: Path) -> None:
    """8 samples take 25 ms to train, and 8 x 0.2 / 2 = 800 ms to read: one loader is far too few."""
    with running(paced, [0.2], step_ms=25) as fleet:
        view = fleet.look(interval=6.0)
    [text] = verdicts(view).values()
    match = re.fullmatch(r"read-bound: add (\d+) loaders", text)
    assert match is not None, text
    assert int(match[1]) >= 4, "31 on a quiet machine; a look cannot see more than 19"
    assert view["trainers"][0]["wait"] > 0.5
    assert view["loaders"][0]["busy"] > 0.8


@pytest.mark.slow
def test_a_loader_with_a_slow_disk_is_named_with_its_pace(paced: Path) -> None:
    with running(paced, [0.05, 0.05, 0.2], step_ms=25) as fleet:
        view = fleet.look(interval=10.0)
        found = verdicts(view)
        assert re.fullmatch(
            r"loader 3 is slow: (a third of|a quarter of|half|\d+% of) the pace of its peers since \d\d:\d\d",
            found["slow"],
        )
        assert [verdict["loader"] for verdict in view["verdicts"] if verdict["kind"] == "slow"] == ["loader 3"]
        assert "read-bound" in found


def test_what_does_not_answer_is_shown_and_not_fatal(paced: Path, tmp_path: Path) -> None:
    gone, other = free_port(), free_port()
    with serving(paced, "--metrics", f"127.0.0.1:{other}"):
        file = tmp_path / "fleet.txt"
        file.write_text(f"# a fleet\n127.0.0.1:{other}\n\n127.0.0.1:{gone}\n")
        done = run_cli("top", "--file", str(file), "--once", "--json", "--interval", "0.2")
        assert done.returncode == 0
        view = json.loads(done.stdout)
        assert view["lost"] == [[f"127.0.0.1:{gone}", "Connection refused"]]
        assert [loader["number"] for loader in view["loaders"]] == [1]
        assert view["verdicts"] == [], "nobody trains"
        picture = tmp_path / "top.svg"
        assert main([f"127.0.0.1:{other}", "--once", "--svg", str(picture), "--interval", "0.2"]) == 0
        assert picture.read_text().startswith("<svg ")
        assert f"127.0.0.1:{other}" in picture.read_text()
        with pytest.raises(ConfigError, match=r"--svg /nowhere/x.svg cannot be written \("):
            main([f"127.0.0.1:{other}", "--once", "--svg", "/nowhere/x.svg", "--interval", "0.2"])
    done = run_cli("top", f"127.0.0.1:{gone}", "--once", "--json", "--interval", "0.2")
    assert (done.returncode, json.loads(done.stdout)["loaders"]) == (1, [])
    with pytest.raises(ConfigError, match=r"no address: name HOST:PORT"):
        main(["--once", "--json"])
    with pytest.raises(ConfigError, match=r"loader-top 'nowhere': HOST:PORT is expected"):
        main(["nowhere", "--once", "--json"])


def test_the_table_shows_the_fleet_and_the_verdict() -> None:
    loaders = (
        LoaderRow(
            number=1, address="a:9100", is_ready=True, ranks=4, queue=7, memory_bytes=3 * 2**30, cache_bytes=2**29,
            cache_limit_bytes=2**31, samples_per_s=812.5, busy=0.93, stages={"read": 0.1, "decode": 0.7, "encode": 0.2},
            cpu_cores=3.5, cache_hits=0.875,
        ),
        LoaderRow(number=2, address="b:9100", error="Connection refused"),
    )  # fmt: skip
    trainer = TrainerRow(address="t:9101", ranks=4, steps=120, queue_depth=2, samples_per_s=800.0, wait=0.25, step_s=10)
    verdict = Verdict("decode-bound", "decode-bound: add 2 loaders")
    view = FleetView(loaders=loaders, trainers=(trainer,), lost=(), verdicts=(verdict,), window_s=10)
    out = io.StringIO()
    Console(file=out, width=140).print(render(view, import_rich()))
    text = out.getvalue()
    for shown in (
        "812.5",
        "93%",
        "decode 70%, encode 20%, read 10%",
        "CPU 3.50, memory 3.0G, cache",
        "hits 88%",
        " 7 ",
        " 4 ",
    ):
        assert shown in text, shown
    assert "b:9100" in text
    assert "no answer (Connection refused)" in text
    assert "trainer t:9101: 4 ranks, step 120, 800.0 samples/s, waits for data 25.0%, queue 2" in text
    assert text.rstrip().endswith("decode-bound: add 2 loaders")
    narrow = io.StringIO()
    Console(file=narrow, width=80).print(render(view, import_rich()))
    words = set(re.sub("[^ -~]", " ", narrow.getvalue()).split())  # without the frame
    assert {"#", "address", "samples/s", "busy", "queue", "ranks", "1", "a:9100", "812.5"} <= words
