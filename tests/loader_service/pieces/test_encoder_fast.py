"""From demonstrations to rows with the codec `fast`: rows of different lengths, whose tokens are the actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.pieces.encoder import RecordEncoder
from loader_service.prepare.first_records import check_first_records
from loader_service.prepare.run import prepare
from loader_service.prepare.summary import report_of, summary_lines, summary_tree
from stoker_proto.errors import DataError, RowError
from stoker_proto.processor import Processor
from tests.tiny_models import make_config, write_model_folder

DEMONSTRATIONS = Path(__file__).parents[2] / "data" / "maniskill" / "val.jsonl"


def test_rows_of_real_demonstrations(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", "llava")
    config = make_config(
        tmp_path / "model",
        "data.dataset_type=mani_openpi",
        f"data.train_data_paths=[{DEMONSTRATIONS}]",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.action.codec=fast",
        "data.action.chunk=8",
        "data.action.codec_options={vocab_size: 256}",
    )
    prepared = prepare(config, splits=("train",))
    assert prepared.codec is not None
    report = report_of(prepared, config.data.action)
    assert report is not None
    assert report.num_actions == 8 * prepared.entries["train"][0].total_samples  # every timestep begins a chunk
    text = "\n".join(summary_lines(prepared, report))
    assert (
        f"{report.most_tokens} the most here, {prepared.codec.max_tokens} the most possible; clamped: 0.0000%" in text
    )
    tree = summary_tree(prepared, report)["codec"]
    assert (tree["max_tokens_per_chunk"], tree["clamped"]) == (prepared.codec.max_tokens, 0.0)
    processor = Processor.build(config, prepared.codec)
    manifest = prepared.entries["train"][0]
    encoded = RecordEncoder(config.data, processor).encode(manifest, 0, 0)
    assert len({len(sample.input_ids) for sample in encoded.samples}) > 2
    for sample in encoded.samples:
        assert sample.action is not None
        learned = sample.input_ids[sample.supervised == 1]
        assert learned[-1] == processor.end_id
        found = processor.actions_from_ids(learned[:-1])
        assert found.shape == (8, 7)
        assert np.abs(found - sample.action).max() <= report.max_abs_error.max() + 1e-6
        with pytest.raises(DataError, match="a chunk has"):
            processor.actions_from_ids(learned[:-2])


def test_a_row_that_may_not_fit_is_told_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first samples are of the beginnings of trajectories, and their chunks may be shorter than others."""
    write_model_folder(tmp_path / "model", "llava")
    overrides = [
        "data.dataset_type=mani_openpi", f"data.train_data_paths=[{DEMONSTRATIONS}]", f"data.cache_dir={tmp_path / 'cache'}",
        "data.action.codec=fast", "data.action.chunk=8", "data.action.codec_options={vocab_size: 256}",
    ]  # fmt: skip
    config = make_config(tmp_path / "model", *overrides)
    prepared = prepare(config, splits=("train",))
    codec: Any = prepared.codec
    manifest = prepared.entries["train"][0]
    encoder = RecordEncoder(config.data, Processor.build(config, codec))
    samples = [encoder.encode(manifest, record, 0).samples for record in range(manifest.num_records)]
    tokens = [[len(codec.encode(sample.action[None])[0]) for sample in of_record] for of_record in samples]
    longest = max(map(max, tokens))
    rows = [len(of_record[0].input_ids) for of_record in samples[:3]]
    needed = max(row - of_record[0] + longest for row, of_record in zip(rows, tokens, strict=False))
    assert max(rows) < needed, "choose other demonstrations: these show nothing"
    for limit, warns in ((needed, False), (needed - 1, True), (max(rows), True)):
        caplog.clear()
        config = make_config(tmp_path / "model", *overrides, max_seq_len=limit)
        check_first_records(config, prepared, Processor.build(config, codec))
        found = [text for text in caplog.messages if f"chunks of up to {longest} tokens occur" in text]
        assert len(found) == warns
        assert all(f"such a row needs {needed}; data.max_seq_len is {limit}" in text for text in found)
    config = make_config(tmp_path / "model", *overrides, max_seq_len=max(rows) - 1)
    with pytest.raises(RowError, match="the row needs"):
        check_first_records(config, prepared, Processor.build(config, codec))
