"""A policy that is asked for several inputs at once says what it says to each alone; NaN is refused; mass outside is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker_proto.actions import StatisticsAccumulator, fit_codec
from stoker_proto.config import ActionConfig
from stoker_proto.processor import Processor
from tests.trainer.support.memory import DIM, make_config, make_processor
from trainer.models.families import family_of, read_model_config
from trainer.policy import Policy, PolicyError, PolicyInput

INSTRUCTIONS = ["push", "push the blue cube to the goal", "pull", "stack the red cube on the green one, slowly"]


def policy_of(model: Path, processor: Processor) -> Policy:
    family = family_of(read_model_config(str(model)))
    return Policy(family.auto_class.from_pretrained(model, dtype=torch.float32), processor, family)


def frames(count: int) -> list[np.ndarray[Any, Any]]:
    """uint8[64, 64, 3] each, all different."""
    return list(np.random.default_rng(7).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8))


@pytest.mark.long
@pytest.mark.parametrize("family", ["tiny_llava", "tiny_idefics3"])
def test_a_batch_says_what_each_input_alone_says(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model: Path = request.getfixturevalue(family)
    policy = policy_of(model, make_processor(make_config(model, tmp_path)))
    images = frames(16)
    inputs = [
        PolicyInput(images=images[2 * i : 2 * i + 2], instruction=INSTRUCTIONS[i % 4]) for i in range(8)
    ]  # two of each instruction, so of each length
    alone = [policy.predict([one])[0] for one in inputs]
    assert len({tuple(prediction.ids.tolist()) for prediction in alone}) > 1, "they should differ"
    together = policy.predict(inputs)
    assert [one.ids.tolist() for one in together] == [one.ids.tolist() for one in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.outside_mass == pytest.approx(other.outside_mass, abs=1e-5)
    actions = policy.act_batch(inputs)
    assert actions.shape == (8, 1, DIM)
    np.testing.assert_array_equal(actions[3], policy.act(inputs[3].images, inputs[3].instruction))


def test_inputs_of_one_length_share_a_forward_pass(tiny_llava: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_llava, make_processor(make_config(tiny_llava, tmp_path)))
    rows: list[int] = []
    policy.model.register_forward_pre_hook(
        lambda _, __, arguments: rows.append(len(arguments["input_ids"])), with_kwargs=True
    )
    policy.predict([PolicyInput(images=[frame], instruction="push") for frame in frames(5)])
    assert rows == [5] * DIM


def test_no_inputs_give_no_actions(tiny_llava: Path, tmp_path: Path) -> None:
    policy = policy_of(tiny_llava, make_processor(make_config(tiny_llava, tmp_path)))
    assert policy.act_batch([]).shape == (0, 1, DIM)


class Says(torch.nn.Module):
    """In the model's place: row r gets the logits of row r of `tables` at each step."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, tables: torch.Tensor) -> None:
        super().__init__()
        self.tables = tables  # [B, vocabulary]

    def forward(self, **_: Any) -> Any:
        return type("Output", (), {"logits": self.tables[:, None], "past_key_values": None})()


def test_rows_of_a_codec_of_variable_length_end_one_by_one(tiny_causal: Path, tmp_path: Path) -> None:
    steps = np.random.default_rng(2).uniform(-0.3, 0.3, (400, 4, DIM))
    movements = np.cumsum(steps, axis=1).astype(np.float32)
    accumulator = StatisticsAccumulator(DIM)
    accumulator.add(movements.reshape(-1, DIM), np.arange(1600, dtype=np.uint64))
    codec = fit_codec("fast", movements, accumulator.finish()[0], chunk=4, vocab_size=128, scale=3)
    processor = Processor.build(
        make_config(tiny_causal, tmp_path, data={"action": ActionConfig(codec="fast", chunk=4)}), codec
    )
    vocabulary, lengths = processor.vocabulary, codec.code_lengths
    assert vocabulary is not None
    assert lengths is not None
    long, short = (int(np.flatnonzero(lengths == length)[0]) for length in (5, 1))
    wanted = vocabulary.to_ids(np.array([long, short]))
    tables = torch.zeros(2, processor.vocab_size_needed)
    tables[0, wanted[0]], tables[0, wanted[1]] = 9, 8
    tables[1, wanted[1]] = 9
    model: Any = Says(tables)
    policy = Policy(model, processor, family_of(read_model_config(str(tiny_causal))))
    first, second = policy.predict([PolicyInput(images=[], instruction="push")] * 2)
    assert vocabulary.to_codes(first.ids).tolist() == [long, long, short, short]
    assert vocabulary.to_codes(second.ids).tolist() == [short] * 12


def test_mass_outside_the_action_tokens_is_reported(tiny_llava: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_llava, tmp_path))
    vocabulary = processor.vocabulary
    assert vocabulary is not None
    logits = torch.full((1, processor.vocab_size_needed), -torch.inf)
    logits[0, vocabulary.first_id] = float(np.log(0.75))
    logits[0, vocabulary.first_id + 1 : vocabulary.end_id] = -80
    logits[0, processor.end_id] = float(np.log(0.25))
    model: Any = Says(logits)
    policy = Policy(model, processor, family_of(read_model_config(str(tiny_llava))))
    [prediction] = policy.predict([PolicyInput(images=frames(1), instruction="push")])
    assert prediction.outside_mass == pytest.approx(0.25)


@pytest.mark.parametrize("where", ["an action token", "another token"])
def test_nan_is_refused(where: str, tiny_llava: Path, tmp_path: Path) -> None:
    processor = make_processor(make_config(tiny_llava, tmp_path))
    vocabulary = processor.vocabulary
    assert vocabulary is not None
    logits = torch.zeros(1, processor.vocab_size_needed)
    logits[0, vocabulary.first_id + 3 if where == "an action token" else processor.end_id] = torch.nan
    model: Any = Says(logits)
    policy = Policy(model, processor, family_of(read_model_config(str(tiny_llava))))
    with pytest.raises(PolicyError, match=r"logits for action token 0 are not finite .* training diverged"):
        policy.act(frames(1), "push")
