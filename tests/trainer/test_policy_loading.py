"""A policy from a checkpoint is the policy of the export; folders that are neither are refused. And one action at a time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from stoker_proto.config import ActionConfig, Config, LoraConfig
from stoker_proto.errors import ConfigError, DataError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import run
from trainer.policy import Policy
from trainer.policy_chunks import ChunkPlayer
from trainer.policy_io import PolicyInput, Prediction
from trainer.sim.evaluation.results import fingerprint_of_export


def train(config: Config, rank: int) -> None:
    run(config)


@pytest.mark.process
@pytest.mark.parametrize(
    ("stage", "precision", "keys"),
    [
        (3, "bf16", {"ema_decay": 0.5}),
        (1, "bf16", {"lora": LoraConfig(rank=4)}),
        pytest.param(1, "fp32", {}, marks=pytest.mark.slow),
    ],
    ids=["averages, zero3", "adapters, zero1 in bf16", "zero1"],
)
def test_a_checkpoint_acts_as_the_export_of_the_same_step(
    stage: int, precision: str, keys: dict[str, Any], tiny_llava: Path, tmp_path: Path
) -> None:
    """Two ranks; partitioned averages of weights with tokens that the base model does not have; adapters; or neither."""
    data = {"action": ActionConfig(codec="bins", vocabulary="added")} if stage == 3 else {}
    config = make_config(
        tiny_llava, tmp_path / "run", zero_stage=stage, precision=precision, max_steps=2, lr=0.05, data=data, **keys
    )
    run_ranks(2, partial(train, config))
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    frame = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    export, checkpoint = tmp_path / "run" / "export", tmp_path / "run" / "checkpoints" / "step-00000002"
    policy = Policy.load(checkpoint)
    assert policy.model.dtype == dtype
    assert policy.processor.num_images == (1, 1)
    exported = Policy.load(export)
    found = policy.model.state_dict()
    untrained = Policy(
        LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=dtype), policy.processor, policy.family
    ).model.state_dict()
    changed = [key for key, tensor in untrained.items() if not torch.equal(found[key][: len(tensor)], tensor)]
    assert len(changed) > 20, "the run must have trained something"
    expected = exported.model.state_dict()
    assert set(expected) == set(found)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert policy.action_ids(frame, "push").tolist() == exported.action_ids(frame, "push").tolist()
    before = fingerprint_of_export(checkpoint)
    damage = next((checkpoint / "deepspeed").glob("*optim_states.pt"))
    whole = damage.read_bytes()
    damage.write_bytes(whole[:1000])
    assert fingerprint_of_export(checkpoint) != before, "an evaluation would resume with other weights"
    with pytest.raises(DataError, match=r"optim_states.pt: not a file of torch.save: it is damaged; take another"):
        Policy.load(checkpoint)
    damage.write_bytes(whole[:-2000] + bytes(1000) + whole[-1000:])
    with pytest.raises(DataError, match=r"weights cannot be loaded: .*; take another checkpoint, or the run's export"):
        Policy.load(checkpoint)
    state = json.loads((checkpoint / "stoker.json").read_text())
    state["config"]["model"]["base_model_path"] = str(tmp_path / "gone")
    (checkpoint / "stoker.json").write_text(json.dumps(state))
    with pytest.raises(
        ConfigError, match=r"its base model is '.*gone', and there is no config.json in it; put the base"
    ):
        Policy.load(checkpoint)
    with pytest.raises(
        ConfigError, match=r"no stoker_processor.json, .* and no stoker.json, .* such as outputs/export, or"
    ):
        Policy.load(checkpoint.parent)
    (export / "config.json").unlink()
    (export / "adapter_config.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"it holds adapters alone .* take the run's checkpoint, whose adapters are merged"
    ):
        Policy.load(export)


class Counting:
    """Predicts chunks of three: the number of the prediction, then hundredths."""

    chunk = 3

    def __init__(self) -> None:
        self.seen: list[str] = []

    def predict(self, inputs: Sequence[PolicyInput]) -> list[Prediction]:
        self.seen += [one.instruction for one in inputs]
        actions = len(self.seen) + np.array([[0.0], [0.25], [0.5]], np.float32)
        return [Prediction(actions=actions, ids=np.zeros(3, np.int64), outside_mass=0.125)]


@pytest.mark.parametrize(
    ("execute", "expected"), [(1, [1, 2, 3, 4]), (2, [1, 1.25, 2, 2.25]), (None, [1, 1.25, 1.5, 2])]
)
def test_the_first_actions_of_a_chunk_are_executed(execute: int | None, expected: list[float]) -> None:
    player = ChunkPlayer(Counting(), execute)
    look = PolicyInput(images=[], instruction="push")
    assert [float(player.next_action(look)[0]) for _ in range(4)] == expected
    assert player.outside_mass == 0.125


def test_a_new_episode_begins_with_a_look() -> None:
    policy = Counting()
    player = ChunkPlayer(policy)
    player.next_action(PolicyInput(images=[], instruction="first"))
    assert not player.needs_prediction
    player.reset()
    assert float(player.next_action(PolicyInput(images=[], instruction="second"))[0]) == 2.0
    assert policy.seen == ["first", "second"]


def test_more_actions_than_a_chunk_has_are_refused() -> None:
    for execute in (0, 4):
        with pytest.raises(ConfigError, match=f"execute {execute}: the model predicts chunks of 3; choose 1 to 3"):
            ChunkPlayer(Counting(), execute)
