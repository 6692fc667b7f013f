"""Tables through `loader-prepare`: what was mended or left out is counted; compressed and cut shards give the same manifests."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.prepare import parts
from loader_service.prepare.command import main
from loader_service.prepare.run import prepare
from loader_service.prepare.summary import summary_lines, summary_tree
from loader_service.sources.base import make_dataset
from stoker_proto.config import Config, DialogueConfig
from stoker_proto.errors import ConfigError, DataError
from tests.tiny_models import cached_in, write_model_folder

MakeConfig = Callable[..., Config]

DIALOGUES = [["u", "a"], ["u", "a", "u"], ["u", "", "u", "a", "u"], ["u", "a"]]


def write_dialogues(path: Path, dialogues: list[list[str]]) -> Path:
    lines = "".join(json.dumps({"data": turns}) + "\n" for turns in dialogues).encode()
    path.write_bytes(gzip.compress(lines, mtime=0) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_mended_records_are_counted_by_rule(name: str, tmp_path: Path, make_config: MakeConfig) -> None:
    shard = write_dialogues(tmp_path / name, DIALOGUES * 10)
    config = make_config(shard, dataset_type="chat", options={"validate": True})
    for _ in range(2):  # scanned, and out of the cache
        prepared = prepare(config)
        manifest = prepared.entries["train"][0]
        assert manifest.notes == {
            "a turn without words was dropped": 10,
            "turns after the assistant's last were dropped": 20,
            "two turns of one speaker in a row were merged": 10,
        }
        assert (manifest.num_records, manifest.total_samples, manifest.num_bad) == (40, 40, 0)
    lines = summary_lines(prepared, None)
    assert "train 0: 20 records: turns after the assistant's last were dropped" in lines
    assert summary_tree(prepared, None)["entries"][0]["notes"] == manifest.notes


def test_the_number_of_parts_changes_no_count(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_dialogues(tmp_path / "a.jsonl", DIALOGUES * 10)
    config = make_config(shard, dataset_type="chat", options={"validate": True})
    whole = prepare(cached_in(tmp_path / "one", config)).entries["train"][0]
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    cut = prepare(cached_in(tmp_path / "two", config)).entries["train"][0]
    assert cut.notes == whole.notes
    assert np.array_equal(cut.offsets, whole.offsets)


def test_a_dataset_that_words_every_note_differently_fills_no_memory() -> None:
    counts = parts.Counter({"known": 1})
    for number in range(1000):
        parts.count_notes(counts, {f"note {number}": 2, "known": 1})
    assert len(counts) == 65
    assert counts["known"] == 1001
    assert counts["other"] == 2 * (1000 - 63)


def test_a_filter_that_leaves_nothing_is_named(tmp_path: Path, make_config: MakeConfig) -> None:
    write_model_folder(tmp_path / "model", "causal")
    (tmp_path / "a.jsonl").write_text('{"content": "x = 1", "path": "a.py"}\n' * 3)
    config = make_config(tmp_path / "a.jsonl", dataset_type="code", options={"languages": ["Python"]})
    config = replace(config, model=replace(config.model, base_model_path=str(tmp_path / "model")))
    with pytest.raises(
        DataError,
        match=r"no sample in all its 3 records \(3 records: left out: none of the columns lang, .*\): change what",
    ):
        prepare(config)


def test_files_left_out_have_no_samples_and_are_counted(tmp_path: Path, make_config: MakeConfig) -> None:
    model = write_model_folder(tmp_path / "model", "causal")
    rows = [{"content": "x" * size} for size in (1, 10, 100, 1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        tmp_path / "a.jsonl", dataset_type="code", options={"min_bytes": 10, "max_bytes": 100}, max_seq_len=999
    )
    config = replace(config, model=replace(config.model, base_model_path=str(model)))
    manifest = prepare(config).entries["train"][0]
    assert manifest.num_samples.tolist() == [0, 1, 1, 0]
    assert manifest.notes == {"left out: larger than max_bytes": 1, "left out: smaller than min_bytes": 1}


def test_bad_dialogues_are_counted_within_the_budget(tmp_path: Path, make_config: MakeConfig) -> None:
    shard = write_dialogues(tmp_path / "a.jsonl", [["u", "a"], ["u"], ["u", "a"]])
    with pytest.raises(DataError, match=r"a\.jsonl:2: no words of the assistant"):
        prepare(make_config(shard, dataset_type="chat", options={"validate": True}))
    config = make_config(shard, dataset_type="chat", options={"validate": True}, on_bad_sample="skip")
    manifest = prepare(config).entries["train"][0]
    assert (manifest.num_bad, manifest.num_samples.tolist()) == (1, [1, 1, 1])


def test_mixed_formats_name_the_entry(tmp_path: Path, make_config: MakeConfig) -> None:
    write_dialogues(tmp_path / "a.jsonl", DIALOGUES)
    write_dialogues(tmp_path / "a.jsonl.gz", DIALOGUES)
    with pytest.raises(ConfigError, match=r"data\.train_data_paths\[0\]: a\.jsonl\.gz and a\.jsonl are named together"):
        prepare(make_config(tmp_path, dataset_type="chat"))


def test_a_folder_of_many_shards(tmp_path: Path, make_config: MakeConfig) -> None:
    for number in range(3):
        write_dialogues(tmp_path / f"{number}.jsonl.gz", [[f"u{number}", f"a{i}"] for i in range(number + 1)])
    config = make_config(tmp_path, dataset_type="chat")
    manifest = prepare(config).entries["train"][0]
    dataset = make_dataset(config.data)
    texts = [
        turn.text
        for record in range(manifest.num_records)
        for sample in dataset.read(
            Path(manifest.shards[manifest.shard_index[record]]),
            int(manifest.offsets[record]),
            int(manifest.sizes[record]),
        )
        for turn in sample.turns
    ]
    assert " ".join(texts) == "u0 a0 u1 a0 u1 a1 u2 a0 u2 a1 u2 a2"


def test_the_command_says_what_was_mended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dialogues(tmp_path / "a.jsonl.gz", DIALOGUES)
    tree: dict[str, Any] = {
        "model": {"base_model_path": "unused"},
        "data": {
            "dataset_type": "chat",
            "train_data_paths": [str(tmp_path / "a.jsonl.gz")],
            "max_seq_len": 64,
            "options": {"validate": True},
        },
        "trainer": {"micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-4},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    arguments = ["--config", str(tmp_path / "config.yaml"), "--cache-dir", str(tmp_path / "cache"), "--verify"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "train 0: 1 records: a turn without words was dropped" in said
    assert "verified: every record was read" in said
    assert not (tmp_path / ".stoker").exists(), "the cache folder holds the unpacked shard too"
    assert len(list((tmp_path / "cache").rglob("plain"))) == 1


@pytest.mark.long
@pytest.mark.parametrize("packing", [False, True])
def test_fields_that_nothing_reads_are_counted(packing: bool, tmp_path: Path, make_config: MakeConfig) -> None:
    model = write_model_folder(tmp_path / "model", "causal")
    turns = [{"role": "user", "content": "u", "name": "Ann"}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turns, **({"score": 1} if i < 1500 else {})} for i in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dialogue = DialogueConfig(template="stoker")
    config = make_config(tmp_path / "a.jsonl", dataset_type="chat", packing=packing, dialogue=dialogue)
    config = replace(config, model=replace(config.model, base_model_path=str(model)))
    some = " (of the first 1,000 rows of each part; data.options.validate looks at all)"
    expected = (
        {"not read: field 'score'": 1500, "not read: turn field 'name'": 2000}
        if packing
        else {f"not read: field 'score'{some}": 1000, f"not read: turn field 'name'{some}": 1000}
    )
    prepared = prepare(config)
    assert prepared.entries["train"][0].notes == expected
    assert f"train 0: {min(expected.values()):,} records: {next(iter(expected))}" in summary_lines(prepared, None)


def test_fields_of_wide_rows_leave_room_for_other_notes() -> None:
    counts = parts.Counter({"known": 1})
    for number in range(100):
        parts.count_notes(counts, {f"not read: field 'f{number}'": 1, "known": 1})
    assert len(counts) == 26
    assert counts["known"] == 101
    assert counts["not read: other fields"] == 100 - 24
