"""Timesteps of a chunk beyond the trajectory's ends: labels like the others, or none (`data.action.learn_padding`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loader_service.inspection.show import decoded_action
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.piece import EncodedSample
from loader_service.prepare.run import prepare
from loader_service.sources.base import make_dataset
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from tests.end_to_end.fleet import write_demonstrations
from tests.tiny_models import make_config, write_model_folder

Encode = Callable[[str, bool], tuple[Processor, dict[str, list[EncodedSample]]]]
LENGTHS = [5, 2]
CHUNK = 3


@pytest.fixture
def encode(tmp_path: Path) -> Encode:
    """`encode(codec, learn_padding)`: (processor, split -> samples of all records)."""
    write_model_folder(tmp_path / "model", "llava")
    jsonl = write_demonstrations(tmp_path / "demos", LENGTHS)

    def run(codec: str, learn_padding: bool) -> tuple[Processor, dict[str, list[EncodedSample]]]:
        config = make_config(
            tmp_path / "model", "data.dataset_type=mani_openpi", f"data.train_data_paths=[{jsonl}]",
            f"data.val_data_paths=[{jsonl}]", f"data.action.codec={codec}", f"data.action.chunk={CHUNK}",
            f"data.action.learn_padding={str(learn_padding).lower()}",
        )  # fmt: skip
        prepared = prepare(config)
        processor = Processor.build(config, prepared.codec)
        encoder = RecordEncoder(config.data, processor)
        return processor, {
            split: [s for record in range(len(LENGTHS)) for s in encoder.encode(entries[0], record, 0).samples]
            for split, entries in prepared.entries.items()
        }

    return run


@pytest.mark.parametrize("codec", ["bins", "vq"])
def test_padding_is_learned_or_not(codec: str, encode: Encode) -> None:
    processor, learned = encode(codec, True)
    _, hidden = encode(codec, False)
    assert processor.codec is not None
    per_timestep = processor.codec.max_tokens // CHUNK
    real = [min(length - t, CHUNK) for length in LENGTHS for t in range(length)]
    for split in ("train", "val"):
        for count, one, other in zip(real, learned[split], hidden[split], strict=True):
            assert one.input_ids.tolist() == other.input_ids.tolist()
            answer = CHUNK * per_timestep + 1  # and the end token
            assert one.supervised.tolist() == [0] * (len(one.input_ids) - answer) + [1] * answer
            expected = one.supervised.copy()
            if split == "train":  # validation compares whole chunks
                expected[len(expected) - answer + count * per_timestep : -1] = 0
            assert other.supervised.tolist() == expected.tolist()
            decoded = decoded_action(other, other.supervised != 0, processor)
            assert np.array_equal(decoded, decoded_action(one, one.supervised != 0, processor))


def test_what_it_decides_is_part_of_the_fingerprints(tmp_path: Path) -> None:
    def identity(*overrides: str) -> dict[str, object]:
        config = make_config(tmp_path, "data.dataset_type=mani_openpi", "data.train_data_paths=[a.jsonl]", *overrides)
        return make_dataset(config.data).read_identity()

    assert identity() == identity("data.action.learn_padding=true") != identity("data.action.learn_padding=false")


def test_a_codec_whose_tokens_mix_timesteps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"learn_padding is false and data\.action\.codec is fast.*use vq or bins"):
        make_config(tmp_path, "data.action.learn_padding=false", "data.action.codec=fast")
