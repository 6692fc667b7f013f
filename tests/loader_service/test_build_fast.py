"""From demonstrations to rows with the codec `fast`: rows of different lengths, whose tokens are the actions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loader_service.build import RecordEncoder
from loader_service.prepare.run import prepare
from loader_service.prepare.summary import report_of, summary_lines, summary_tree
from stoker_proto.errors import DataError
from stoker_proto.processor import Processor
from tests.tiny_models import make_config, write_model_folder

DEMONSTRATIONS = Path(__file__).parents[1] / "data" / "maniskill" / "val.jsonl"


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
    assert f"{report.most_tokens} at most here, {prepared.codec.max_tokens} at most at all; clamped: 0.0000%" in text
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
