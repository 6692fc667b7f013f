"""`StokerDataset`: the batches of Stoker's own trainer in any loop, also after loaders and trainers were killed."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from stoker_proto.config import Config
from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError
from tests.end_to_end.fleet import ROOT, Loader, environment, serving, wait_until, write_config
from tests.end_to_end.recorded import record_steps, write_chats
from tests.trainer.support.ranks import run_ranks
from trainer.feed import dataset as dataset_module
from trainer.feed.dataset import StokerDataset

pytestmark = pytest.mark.process
CHATS = 45  # six steps of 8 rows, the last of 5
START_S = 1200.0  # on a busy machine the imports alone take minutes


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_causal: Path) -> Path:
    """Chats for a text model."""
    folder = tmp_path_factory.mktemp("dataset")
    return write_config(folder, tiny_causal, [write_chats(folder / "chats.jsonl", CHATS)], dataset_type="chat")


@pytest.fixture(scope="module")
def loader(config: Path) -> Iterator[Loader]:
    """One that serves them to all tests."""
    with serving(config) as running:
        yield running


def loaded(config: Path, *loaders: Loader, **trainer: int) -> Config:
    connect = f"cluster.loader_addresses=[{','.join(one.address for one in loaders)}]"
    return load_config(config, [connect, *(f"trainer.{key}={value}" for key, value in trainer.items())])


def lines(folder: Path, rank: int = 0) -> dict[int, dict[str, Any]]:
    """Step -> its newest line of the digest log, without what differs between programs."""
    found = {}
    for text in (folder / f"digests-rank{rank}.jsonl").read_text().splitlines():
        line = json.loads(text)
        found[line["step"]] = {key: value for key, value in line.items() if key not in ("loss", "record")}
    return found


@pytest.fixture(scope="module")
def expected(config: Path, loader: Loader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own digests of two epochs on one rank and on two."""
    folder = tmp_path_factory.mktemp("expected")
    for ranks in (1, 2):
        record_steps(config, [loader.address], folder / str(ranks), ranks=ranks, first_step=1, stop_step=13)
    return folder


def test_the_batches_are_ours_and_a_saved_position_continues_them(
    config: Path, loader: Loader, expected: Path, tmp_path: Path
) -> None:
    seen = []
    with StokerDataset(loaded(config, loader), output_dir=tmp_path) as dataset:
        assert dataset.passes == 2
        for _ in range(2):  # an iterator that is left begins again
            assert len(list(islice(dataset, 3))) == 3
        assert dataset.state_dict() | {"fingerprints": {}} == {
            "format": 1, "epoch": 0, "sample": 8, "steps": 1, "global_batch_size": 8, "fingerprints": {},
        }  # fmt: skip
        for batch in islice(DataLoader(dataset, batch_size=None), 8):
            assert batch.keys() == {"input_ids", "labels", "attention_mask"}
            assert batch["input_ids"].shape == batch["labels"].shape
            seen.append(batch["labels"])
        state = json.loads(json.dumps(dataset.state_dict()))
    assert (state["epoch"], state["sample"], state["steps"]) == (0, 32, 4)
    with StokerDataset(loaded(config, loader), output_dir=tmp_path) as dataset:
        dataset.load_state_dict(state)
        assert len(list(dataset)) == 2 * 2  # the rest of the epoch
        assert len(list(dataset)) == 6 * 2
    assert lines(tmp_path) == lines(expected / "1")
    with pytest.raises(ConfigError, match=r"trainer.global_batch_size is 16, and the state was saved with 8"):
        StokerDataset(loaded(config, loader, global_batch_size=16)).load_state_dict(state)


def test_rank_and_world_size_are_those_of_torch(config: Path, loader: Loader, expected: Path, tmp_path: Path) -> None:
    def work(rank: int) -> str:
        with pytest.raises(ConfigError) as refused:
            next(iter(StokerDataset(loaded(config, loader))))
        torch.distributed.init_process_group("gloo")
        with StokerDataset(loaded(config, loader), output_dir=tmp_path) as dataset:
            assert dataset.passes == 1
            assert len(list(dataset)) == 6
        return str(refused.value)

    for said in run_ranks(2, work):
        assert said.startswith("WORLD_SIZE is above 1 and torch.distributed is not initialised")
    for rank in range(2):
        of_two = lines(expected / "2", rank)
        assert lines(tmp_path, rank) == {step: of_two[step] for step in range(1, 7)}


def test_a_worker_of_a_data_loader_is_refused(config: Path, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "get_worker_info", lambda: object())  # as in a worker process
    with pytest.raises(ConfigError, match="set num_workers=0"):
        next(iter(StokerDataset(loaded(config, loader))))


@pytest.mark.slow  # two processes that import torch, and TRL
@pytest.mark.timeout(5 * START_S)
@pytest.mark.parametrize("example", ["plain_loop", "hugging_face", "trl_sft"])
def test_an_example_trains_our_batches_though_loader_and_trainer_are_killed(
    example: str, config: Path, loader: Loader, tmp_path: Path
) -> None:
    if example == "trl_sft" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: pip install -c deploy/constraints.txt 'stoker[trl]'")
    out = tmp_path / "out"
    with serving(config) as doomed, (tmp_path / "log").open("w") as log:
        process = start(example, config, [doomed, loader], out, log, steps=100_000)
        try:
            wait_until(lambda: reached(process, out) >= 2, START_S, "step 2")
            doomed.process.send_signal(signal.SIGKILL)
            killed_at = reached(process, out)
            wait_until(lambda: reached(process, out) >= killed_at + 3 and saved(out), START_S, "steps without it")
        finally:
            process.kill()
            process.wait(60)
    before = reached(None, out)
    with (tmp_path / "log").open("a") as log:
        process = start(example, config, [loader], out, log, steps=before + 3)
        try:
            assert process.wait(START_S) == 0, (tmp_path / "log").read_text()[-3000:]
        finally:
            process.kill()
            process.wait(60)
    assert (out / "model" / "model.safetensors").exists()
    found = lines(out)
    resumed_at = [json.loads(text)["step"] for text in (out / "digests-rank0.jsonl").read_text().splitlines()]
    assert max(found) == before + 3
    assert 1 not in resumed_at[resumed_at.index(before) + 1 :], "it resumed"
    record_steps(config, [loader.address], tmp_path / "ours", ranks=1, first_step=1, stop_step=before + 4)
    assert found == lines(tmp_path / "ours")


def start(example: str, config: Path, loaders: list[Loader], out: Path, log: Any, *, steps: int) -> Any:
    """The example, with a checkpoint every second step."""
    connect = f"cluster.loader_addresses=[{','.join(one.address for one in loaders)}]"
    command = [sys.executable, "-m", f"trainer.examples.{example}", "--config", str(config), "--set", connect]
    command += ["--out", str(out), "--steps", str(steps), "--save-every", "2"]
    return subprocess.Popen(command, cwd=ROOT, env=environment(HF_HUB_OFFLINE="1"), stdout=log, stderr=log)


def reached(process: Any, out: Path) -> int:
    """The newest step in the log."""
    assert process is None or process.poll() is None, "the example ended"
    path = out / "digests-rank0.jsonl"
    whole = (
        [text for text in path.read_text().splitlines(keepends=True) if text.endswith("\n")] if path.exists() else []
    )
    return int(json.loads(whole[-1])["step"]) if whole else 0


def saved(out: Path) -> bool:
    """There is something to resume from."""
    return bool([*out.glob("checkpoint.pt"), *out.glob("checkpoint-*/stoker_feed.json")])
