"""The files of an export that the published code reads: statistics, and what is said where it could not read the actions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker_proto.actions import ActionStatistics, StatisticsAccumulator, fit_codec
from stoker_proto.config import ActionConfig
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config
from trainer.models.openvla.actions import unnormalise
from trainer.models.openvla.saving import published_statistics, write_published_files


def test_a_dimension_that_never_moved_comes_back_as_its_value() -> None:
    """Masked or not: the published code knows q01, q99 and mask only."""
    arrays: dict[str, Any] = {
        "min": [0.25, 1.0, -1.0], "max": [0.25, 1.0, 1.0], "q01": [0.25, 1.0, -0.5], "q99": [0.25, 1.0, 0.5],
        "mean": [0.25, 1.0, 0.0], "std": [0.0, 0.0, 0.3], "mask": [True, False, True],
    }  # fmt: skip
    statistics = ActionStatistics(count=9, **{name: np.array(value) for name, value in arrays.items()})
    found = published_statistics(statistics)
    assert found["num_transitions"] == 9
    assert found["action"]["mask"] == [True, True, True]
    codes = 32000 - np.digitize(statistics.normalise(np.array([0.25, 1.0, 0.5])), np.linspace(-1, 1, 256))
    action = unnormalise(codes, found["action"], vocab_size=32000, num_bins=256)
    np.testing.assert_allclose(action, [0.25, 1.0, 0.498], atol=1e-3)


@pytest.mark.parametrize(
    ("codec", "vocabulary", "is_readable"),
    [("bins", "reuse_last", True), ("bins", "added", False), ("vq", "reuse_last", False)],
)
def test_actions_that_the_published_code_cannot_read_are_said(
    codec: Any, vocabulary: Any, is_readable: bool, tiny_openvla: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    accumulator = StatisticsAccumulator(3)
    accumulator.add(
        np.random.default_rng(0).uniform(-1, 1, (200, 3)).astype(np.float32), np.arange(200, dtype=np.uint64)
    )
    statistics, sample = accumulator.finish()
    action = ActionConfig(codec=codec, vocabulary=vocabulary)
    options = {"num_bins": 64} if codec == "bins" else {"codebook_size": 16, "levels": 1}
    config = make_config(tiny_openvla, tmp_path, data={"action": action})
    processor = Processor.build(config, fit_codec(codec, sample, statistics, chunk=1, **options))
    target = tmp_path / "export"
    target.mkdir()
    write_published_files(
        tiny_openvla, target, processor=processor, sources=("first", "second"), dtype="bfloat16", vocab_size=2048
    )
    written = json.loads((target / "config.json").read_text())
    assert list(written["norm_stats"]) == ["first+second"]
    assert written["text_config"]["vocab_size"] == 2048
    assert written["dtype"] == "bfloat16"
    assert written["n_action_bins"] == (64 if codec == "bins" else 256)
    assert ("OpenVLA's published code reads actions of data.action.codec=bins" in caplog.text) is not is_readable
