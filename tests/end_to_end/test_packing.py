"""Packed rows from real loaders: every sample once, the same rows whoever serves and asks, full, bad records in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from stoker_proto.config.reader import load_config
from stoker_proto.errors import DataError
from stoker_proto.processor import Processor
from tests.end_to_end.conftest import LENGTHS as ROBOTS
from tests.end_to_end.fleet import micro_batches_of, pull, run_cli, serving, write_config
from tests.end_to_end.text_dataset import write_questions
from tests.tiny_models import write_model_folder
from trainer.feed.feed import Feed

MAX = 64
COUNT = 160
LENGTHS = np.maximum(np.random.default_rng(0).lognormal(3.0, 0.9, COUNT), 8).astype(int).tolist()
SAMPLES = sorted((0, record, part) for record, tokens in enumerate(LENGTHS) for part in range(-(-tokens // MAX)))


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a small text model."""
    return write_model_folder(tmp_path_factory.mktemp("text"), "causal")


@pytest.fixture
def packed(tmp_path: Path, text_model: Path) -> Path:
    """A config over questions of LENGTHS tokens, packed."""
    return make_config(tmp_path, text_model)


def make_config(folder: Path, model: Path, **data: Any) -> Path:
    shard = folder / "questions.jsonl"
    shard.touch()
    keys = {
        "dataset_type": "tests.end_to_end.text_dataset:Questions",
        "max_seq_len": MAX,
        "packing": True,
        "order": {"lanes": 4, "cell": 3, "window_rows": 12},
        **data,
    }
    config = write_config(folder, model, [shard], **keys)
    if not shard.stat().st_size:
        write_questions(shard, Processor.build(load_config(config, []), None), LENGTHS, MAX)
    return config


def test_every_sample_comes_once_and_rows_are_full(packed: Path) -> None:
    with serving(packed) as loader:
        first = pull(packed, [loader.address])
        second = pull(packed, [loader.address], epoch=1)
        loaded = load_config(packed, [f"cluster.loader_addresses=[{loader.address}]"])
        with Feed(loaded, "train", 0, 1) as feed:
            feed.connect()
            (progress,) = feed.progress(fresh_within_s=30).values()
    assert sorted(first.keys) == sorted(second.keys) == SAMPLES
    assert first.keys != second.keys
    assert sum(LENGTHS) / (len(first.rows) * MAX) > 0.9  # of windows of 12 rows half a row is lost
    window = "data.order.window_rows=128"  # the default: all of these in one window
    with serving(packed, "--set", window) as loader:
        assert sum(LENGTHS) / (len(pull(packed, [loader.address], window).rows) * MAX) > 0.97
    assert max(first.rows) > 2
    assert progress["records_decoded"] == progress["records_distinct"] == COUNT  # whatever the number of their rows
    assert progress["samples"] == 2 * len(SAMPLES)


def test_global_batches_are_the_same_for_any_loaders_workers_ranks_and_micro_batches(packed: Path) -> None:
    with serving(packed) as one:
        expected = pull(packed, [one.address])
        ranks = pull(packed, [one.address], "trainer.micro_batch_size=2", ranks=2)
        micro = pull(packed, [one.address], "trainer.micro_batch_size=1", "trainer.feed.prefetch=9")
        rest = pull(packed, [one.address], first_sample=16)
    with serving(packed, "--set", "loader.workers=3") as a, serving(packed) as b:
        several = pull(packed, [a.address, b.address], ranks=2)
    for other in (ranks, micro, several):
        assert (other.keys, other.rows, other.steps) == (expected.keys, expected.rows, expected.steps)
    assert rest.steps == expected.steps[2:]  # a resume in mid-epoch; 8 rows a step
    assert rest.rows == expected.rows[16:]


def test_rows_grouped_by_length_come_once_and_waste_less(tmp_path: Path, text_model: Path) -> None:
    def padding(config: Path) -> float:
        keys, real, all_tokens = [], 0, 0
        for batch in micro_batches_of(config):
            keys += batch.sample_keys.tolist()
            real += int(batch.attention_mask[: batch.num_rows].sum())
            all_tokens += batch.input_ids[: batch.num_rows].size
        assert sorted(map(tuple, keys)) == SAMPLES
        return 1 - real / all_tokens

    order = {"lanes": 2, "cell": 4, "window_rows": 64}
    grouped = padding(make_config(tmp_path, text_model, packing=False, group_by_length=True, order=order))
    assert grouped < 0.7 * padding(make_config(tmp_path, text_model, packing=False, order=order))


def change_record(config: Path, number: int, **changes: Any) -> None:
    shard = config.parent / "questions.jsonl"
    lines = shard.read_bytes().splitlines()
    lines[number] = orjson.dumps(orjson.loads(lines[number]) | changes)
    shard.write_bytes(b"\n".join(lines) + b"\n")


def test_a_bad_record_keeps_its_place_in_its_row(packed: Path) -> None:
    with serving(packed) as loader:
        good = pull(packed, [loader.address])
    change_record(packed, 7, broken=True)
    skip = ("--set", "data.on_bad_sample=skip")
    with serving(packed, *skip) as loader:
        found = pull(packed, [loader.address], "data.on_bad_sample=skip")
    assert (found.keys, found.rows) == (good.keys, good.rows)
    assert ["no turns" in why for why in found.skipped] == [True] * -(-LENGTHS[7] // MAX)
    with serving(packed) as loader, pytest.raises(DataError, match="no turns"):
        pull(packed, [loader.address])


def test_counts_that_are_not_those_of_the_samples_are_named(packed: Path) -> None:
    record = next(i for i, tokens in enumerate(LENGTHS) if tokens < MAX)
    change_record(packed, record, tokens=LENGTHS[record] + 1)
    message = f"record {record}, field sample 0: it has {LENGTHS[record]} tokens, and the scan's counts say"
    with serving(packed) as loader, pytest.raises(DataError, match=message):
        pull(packed, [loader.address])


def test_what_cannot_be_packed_is_refused_in_words(tmp_path: Path, model: Path, demos: Path) -> None:
    config = write_config(tmp_path, model, [demos], packing=True)
    found = run_cli("serve", "--config", str(config), "--check")
    assert found.returncode == 1
    assert f"data.packing is for text, and here is none ({demos}: it holds actions)" in found.stderr
    pictures = make_config(tmp_path, model)
    change_record(pictures, 3, picture=True, samples=[["ask", "a"]], tokens=20)
    with serving(pictures) as loader, pytest.raises(DataError, match="it has images, and"):
        pull(pictures, [loader.address])
    change_record(pictures, 3, tokens=0)
    found = run_cli("serve", "--config", str(pictures), "--check")
    assert f"questions.jsonl: 1 of its {COUNT} records have no count of tokens" in found.stderr
    both = run_cli("serve", "--config", str(pictures), "--check", "--set", "data.group_by_length=true")
    assert "data.packing and data.group_by_length are both true" in both.stderr


def test_text_is_packed_beside_trajectories_that_are_not(tmp_path: Path, model: Path, demos: Path) -> None:
    config = make_config(tmp_path, model, max_seq_len=96)
    shard = tmp_path / "questions.jsonl"
    write_questions(shard, Processor.build(load_config(config, []), None), LENGTHS, 96)
    sources = [
        {"dataset_type": "mani_openpi", "paths": [str(demos)], "name": "robots"},
        {"dataset_type": "tests.end_to_end.text_dataset:Questions", "paths": [str(shard)], "name": "chats"},
    ]
    config = make_config(tmp_path, model, max_seq_len=96, dataset_type="", train_data_paths=[], sources=sources)
    with serving(config) as loader:
        found = pull(config, [loader.address])
    robots = [(0, record, timestep) for record, length in enumerate(ROBOTS) for timestep in range(length)]
    chats = [(1, record, part) for record, tokens in enumerate(LENGTHS) for part in range(-(-tokens // 96))]
    assert sorted(found.keys) == robots + chats
    entries = np.array(found.keys)[np.cumsum(found.rows) - 1, 0]
    assert {rows for rows, entry in zip(found.rows, entries, strict=True) if entry == 0} == {1}
    assert np.mean([rows for rows, entry in zip(found.rows, entries, strict=True) if entry == 1]) > 2
