"""A policy tells its model the robot's state exactly as the loader told it in training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stoker_proto.actions import StatisticsAccumulator
from stoker_proto.errors import DataError, RowError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config, make_processor
from trainer.models.families import family_of, read_model_config
from trainer.policy import Policy


def test_the_state_is_in_the_prompt(tiny_llava: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llava, tmp_path)
    accumulator = StatisticsAccumulator(2)
    accumulator.add(np.random.default_rng(0).normal(size=(300, 2)), np.arange(300, dtype=np.uint64))
    config = replace(config, data=replace(config.data, state="text"))
    processor = Processor.build(config, make_processor(config).codec, accumulator.finish()[0])
    processor.save(tmp_path / "saved")
    loaded = Processor.load(tmp_path / "saved")
    family = family_of(read_model_config(str(tiny_llava)))
    policy = Policy(family.auto_class.from_pretrained(tiny_llava, dtype=torch.float32), loaded, family)
    seen: list[list[int]] = []
    policy.model.register_forward_pre_hook(
        lambda _, __, arguments: seen.append(arguments["input_ids"][0].tolist()), with_kwargs=True
    )
    frame = np.zeros((64, 64, 3), np.uint8)
    for state in (np.array([0.5, -1], np.float32), np.array([0.5, 1], np.float32)):
        seen.clear()
        codes = processor.codec.encode(policy.act(frame, "push", state)[None])[0]  # type: ignore[union-attr]
        row = processor.encode("push", 1, codes=codes, state=state)
        assert row.input_ids[: len(seen[0])].tolist() == seen[0]
        assert "State: " in loaded._tokenizer.tokenizer.decode(seen[0])
    with pytest.raises(RowError, match=r"data.state is text, and a sample has no state"):
        policy.act(frame, "push")


def test_a_state_that_training_did_not_have_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_llava, tmp_path))
    family = family_of(read_model_config(str(tiny_llava)))
    policy = Policy(family.auto_class.from_pretrained(tiny_llava, dtype=torch.float32), processor, family)
    with pytest.raises(DataError, match=r"a state is given, but this model was trained without"):
        policy.act(np.zeros((64, 64, 3), np.uint8), "push", np.zeros(2, np.float32))
