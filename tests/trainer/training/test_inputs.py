"""Micro-batches become what the model's own processor would have made; a batch without an image gets a dummy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.support.memory import Example, make_config, make_examples, make_piece, make_processor
from trainer.feed.batch import BatchBuilder, MicroBatch
from trainer.models.families import family_of, read_model_config
from trainer.training.inputs import InputMaker

CPU = torch.device("cpu")


def make_batch(examples: list[Example], config_model: Path, tmp_path: Path) -> tuple[MicroBatch, InputMaker]:
    config = make_config(config_model, tmp_path)
    processor = make_processor(config)
    build = BatchBuilder(decoder=processor, num_rows=2, max_tokens=96)
    family = family_of(read_model_config(str(config_model)))
    batch = build([make_piece(examples, list(range(len(examples))), processor)])
    return batch, InputMaker(processor, family, CPU, torch.float32)


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_pixels_are_those_of_the_models_own_processor(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from transformers import AutoImageProcessor

    model: Path = request.getfixturevalue(f"tiny_{name}")
    examples = make_examples(2, seed=3)
    batch, make_inputs = make_batch(examples, model, tmp_path)
    found = make_inputs(batch).arguments
    frames = [example.frame for example in examples if example.frame is not None]
    processor = AutoImageProcessor.from_pretrained(model, backend="pil")
    options = {"do_image_splitting": False} if name == "idefics3" else {}
    expected = processor(
        [[frame] for frame in frames] if name == "idefics3" else frames, return_tensors="pt", **options
    )
    pixels = expected["pixel_values"]  # [2, 3, H, W], or [2, 1, 3, H, W]
    torch.testing.assert_close(
        found["pixel_values"].reshape(2, 3, 64, 64), pixels.reshape(2, 3, 64, 64), atol=1e-5, rtol=0
    )
    if name == "idefics3":
        assert found["pixel_attention_mask"].bool().all()
        assert expected["pixel_attention_mask"].bool().all()


def test_a_batch_without_an_image_gets_a_row_that_no_label_refers_to(tiny_llava: Path, tmp_path: Path) -> None:
    examples = [Example(instruction="say", answer="yes")] * 2
    batch, make_inputs = make_batch(examples, tiny_llava, tmp_path)
    assert batch.pixels is None
    inputs = make_inputs(batch)
    ids = inputs.arguments["input_ids"]
    rows, length = batch.input_ids.shape
    assert ids.shape == (rows + 1, max(length, 16))
    np.testing.assert_array_equal(ids[:rows, :length].numpy(), batch.input_ids)
    assert (ids == make_inputs.processor.image_token_id).sum(dim=1).tolist() == [0, 0, 16]
    assert inputs.arguments["attention_mask"].sum(dim=1).tolist() == [*batch.attention_mask.sum(axis=1).tolist(), 16]
    assert inputs.arguments["pixel_values"].shape == (1, 3, 64, 64)
    assert inputs.num_rows == len(inputs.targets) == rows


def test_a_text_model_gets_no_dummy(tiny_causal: Path, tmp_path: Path) -> None:
    batch, make_inputs = make_batch([Example(instruction="say", answer="yes")] * 2, tiny_causal, tmp_path)
    assert set(make_inputs(batch).arguments) == {"input_ids", "attention_mask"}
    assert len(make_inputs(batch).arguments["input_ids"]) == 2
