"""A run on a real local Ray cluster, a head and three raylets: nodes die, and the batches are those of an undisturbed run."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from stoker_proto.run_record import ROW_BYTES
from tests.end_to_end.fleet import (
    ROOT,
    environment,
    micro_batches_of,
    wait_until,
    write_config,
    write_demonstrations,
)

START_S = 1200.0
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(6 * START_S),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="NOT TESTED: Ray; pip install -e '.[ray]'"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without room for work, and three nodes of four cores each, all on this machine."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        for _ in range(3):
            cluster.add_node(num_cpus=4)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Robot demonstrations; a node with a rank and a loader, one with a loader; a checkpoint every 10 steps."""
    folder = tmp_path_factory.mktemp("ray")
    model = folder / "llava"
    command = [sys.executable, "-m", "trainer.models.tiny", "--family", "llava", "--out", str(model)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    path = write_config(folder, model, [write_demonstrations(folder / "demos", [8] * 160)])
    tree = yaml.safe_load(path.read_text())
    tree["model"]["precision"] = "fp32"
    tree["cluster"] = {"num_nodes": 2, "component_placement": {"trainer": 0, "dataloader": "0-1"}}
    tree["trainer"] |= {
        "checkpoint": {"interval": 10},
        "export": False,
        "logger": {"tensorboard": False},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


class Launched:
    """`ray_launch.py` on the cluster, and what it says."""

    def __init__(self, cluster: Any, config: Path, output: Path, *overrides: str) -> None:
        output.mkdir()
        self.output, self.log = output, output / "log"
        sets = [f"trainer.output_dir={output}", *overrides]
        command = [sys.executable, "deploy/ray_launch.py", "--config", str(config), "--address", cluster.address]
        command += [part for value in sets for part in ("--set", value)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=log, stderr=log)

    def said(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.log.read_text())

    def wait_for(self, pattern: str) -> re.Match[str]:
        def found() -> bool:
            assert self.process.poll() is None or self.said(pattern), self.log.read_text()[-4000:]
            return self.said(pattern) is not None

        wait_until(found, START_S, pattern)
        match = self.said(pattern)
        assert match
        return match

    def steps(self) -> list[dict[str, Any]]:
        path = self.output / "digests-rank0.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until_step(self, step: int) -> None:
        wait_until(lambda: any(line["step"] >= step for line in self.steps()), START_S, f"step {step}")

    def end(self) -> int:
        return self.process.wait(START_S)


@contextlib.contextmanager
def launched(cluster: Any, config: Path, output: Path, *overrides: str) -> Iterator[Launched]:
    run = Launched(cluster, config, output, *overrides)
    try:
        yield run
    finally:
        run.process.kill()
        run.process.wait(60)


def lineage(steps: list[dict[str, Any]]) -> dict[int, list[str]]:
    """Step -> digests of its micro-batches; of a step that was trained twice, the last time."""
    return {line["step"]: line["micro_batches"] for line in steps}


def raylets_above(program: str) -> set[int]:
    """Process numbers of the raylets of the nodes where the program runs."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if program in " ".join(process.cmdline()):
                found |= {parent.pid for parent in process.parents() if parent.name() == "raylet"}
    return found


def kill_the_node_of(cluster: Any, program: str, other_than: str | None = None) -> None:
    """SIGKILL to the raylet of a node, not the head, where a program of the run runs."""
    raylets = raylets_above(program) - (raylets_above(other_than) if other_than else set())
    for node in list(cluster.worker_nodes):
        if node.all_processes["raylet"][0].process.pid in raylets:
            cluster.remove_node(node, allow_graceful=False)
            return
    raise AssertionError(f"no node but the head runs {program}")


@pytest.fixture(scope="module")
def undisturbed(cluster: Any, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    output = tmp_path_factory.mktemp("runs") / "undisturbed"
    with launched(cluster, config, output) as run:
        assert run.end() == 0, run.log.read_text()[-4000:]
        assert run.said(r"loader 0 is ready at tcp://[\d.]+:\d+, on node 0")
        return lineage(run.steps())


def test_ctrl_c_leaves_nothing(cluster: Any, config: Path, undisturbed: dict[int, list[str]], tmp_path: Path) -> None:
    import ray

    with launched(cluster, config, tmp_path / "interrupted", "trainer.epochs=50") as run:
        run.until_step(3)
        run.process.send_signal(signal.SIGINT)
        assert run.end() == 130
    wait_until(
        lambda: not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])],
        60,
        "the end of all processes",
    )
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        end = time.monotonic() + 60
        while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
            assert time.monotonic() < end, ray.available_resources()
            time.sleep(0.2)
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 dialogues in 8 steps; two ranks on one node, two loaders on another."""
    folder = tmp_path_factory.mktemp("chat")
    model, shard = folder / "model", folder / "chat.jsonl"
    command = [sys.executable, "-m", "trainer.models.tiny", "--family", "causal", "--out", str(model)]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    dialogues = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]
        for i in range(64)
    ]
    shard.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in dialogues))
    path = write_config(folder, model, [shard], dataset_type="chat")
    tree = yaml.safe_load(path.read_text())
    del tree["data"]["action"]
    tree["model"]["precision"] = "fp32"
    tree["cluster"] = {"num_nodes": 2, "component_placement": {"trainer": "0-1", "dataloader": "2-3"}}
    tree["trainer"] |= {"export": False, "logger": {"tensorboard": False}}
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_chat_run_with_several_ranks_on_a_node(cluster: Any, chat: Path, tmp_path: Path) -> None:
    alone = [[row[:ROW_BYTES].hex() for row in micro.row_digests] for micro in micro_batches_of(chat)]
    expected = {step + 1: sorted(alone[2 * step] + alone[2 * step + 1]) for step in range(8)}
    assert len(alone) == 16
    output = tmp_path / "chat"
    with launched(cluster, chat, output) as run:
        assert run.end() == 0, run.log.read_text()[-4000:]
        assert run.said(r"node 0 is .*: rank 0, rank 1\n")
        assert run.said(r"node 1 is .*: loader 0, loader 1\n")
    found: dict[int, list[str]] = {}
    for rank in range(2):
        for line in (output / f"digests-rank{rank}.jsonl").read_text().splitlines():
            (rows,) = json.loads(line)["rows"]
            each = [rows[i : i + 2 * ROW_BYTES] for i in range(0, len(rows), 2 * ROW_BYTES)]
            found.setdefault(json.loads(line)["step"], []).extend(each)
    assert {step: sorted(rows) for step, rows in found.items()} == expected


def test_what_does_not_fit_is_said(cluster: Any, config: Path) -> None:
    command = [sys.executable, "deploy/ray_launch.py", "--config", str(config), "--address", cluster.address]
    command += ["--nodes-deadline-s", "5", "--set", "loader.cores=64"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=START_S)
    assert result.returncode == 1
    asked = "the placement does not fit. Asked, each on a node of its own: 65 CPU; 64 CPU. The cluster has "
    assert asked in result.stderr


@pytest.mark.parametrize("address", ["127.0.0.1:1", "a..b:6379"])
def test_no_cluster_there(address: str) -> None:
    command = [
        sys.executable,
        "deploy/ray_launch.py",
        "--config",
        "deploy/configs/demo.yaml",
        "--address",
        address,
    ]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=START_S)
    assert result.returncode == 1
    assert f"error: no Ray cluster answers at {address}" in result.stderr


def test_nodes_that_die_change_no_batch(
    cluster: Any, config: Path, undisturbed: dict[int, list[str]], tmp_path: Path
) -> None:
    """First a node with a loader, then the node of the rank. The last test: two of the three nodes are gone."""
    assert sorted(undisturbed) == list(range(1, 161))
    with launched(cluster, config, tmp_path / "disturbed", "trainer.epochs=1") as run:
        run.until_step(5)
        kill_the_node_of(cluster, "loader_service.cli serve", other_than="trainer/main.py")
        run.wait_for("is gone: ")
        run.wait_for(r"(?s)is gone: .*loader \d is ready at")
        run.until_step(60)
        kill_the_node_of(cluster, "trainer/main.py")
        run.wait_for("restart 1 of 3: the run resumes from its newest checkpoint")
        assert run.end() == 0, run.log.read_text()[-4000:]
        assert lineage(run.steps()) == undisturbed
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
