"""The policy with a codec of variable length: generation fills a chunk exactly, whatever the model would rather say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from stoker_proto.actions import StatisticsAccumulator, fit_codec
from stoker_proto.config import ActionConfig
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config
from trainer.evals.scores import Sums, add_scores
from trainer.models.families import family_of, read_model_config
from trainer.policy import Policy

CHUNK, DIM = 4, 3


@pytest.fixture(scope="module")
def movements() -> np.ndarray:
    """float32[400, 4, 3]: smooth."""
    steps = np.random.default_rng(2).uniform(-0.3, 0.3, (400, CHUNK, DIM))
    return np.cumsum(steps, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def processor(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory, movements: np.ndarray) -> Processor:
    accumulator = StatisticsAccumulator(DIM)
    accumulator.add(movements.reshape(-1, DIM), np.arange(400 * CHUNK, dtype=np.uint64))
    codec = fit_codec("fast", movements, accumulator.finish()[0], chunk=CHUNK, vocab_size=128, scale=3)
    config = make_config(
        tiny_causal, tmp_path_factory.mktemp("o"), data={"action": ActionConfig(codec="fast", chunk=CHUNK)}
    )
    return Processor.build(config, codec)


class Wishes(torch.nn.Module):
    """Stands in the model's place: at every step it wants the same action tokens, the first most."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, wanted: list[int], size: int) -> None:
        super().__init__()
        self.logits = torch.zeros(1, 1, size)
        for rank, token in enumerate(wanted):
            self.logits[0, 0, token] = 100.0 - rank

    def forward(self, **_: Any) -> Any:
        return type("Output", (), {"logits": self.logits, "past_key_values": None})()


def test_a_random_model_gives_whole_chunks(tiny_causal: Path, processor: Processor) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_causal, dtype=torch.float32)
    policy = Policy(model, processor, family_of(read_model_config(str(tiny_causal))))
    actions = policy.act([], "push the cube")
    assert actions.shape == (CHUNK, DIM)
    assert np.isfinite(actions).all()


def test_tokens_that_do_not_fit_any_more_are_not_chosen(tiny_causal: Path, processor: Processor) -> None:
    codec, vocabulary = processor.codec, processor.vocabulary
    assert codec is not None
    assert vocabulary is not None
    assert codec.code_lengths is not None
    lengths = codec.code_lengths
    long, short = (int(np.flatnonzero(lengths == length)[0]) for length in (5, 1))
    wanted = vocabulary.to_ids(np.array([long, short]))
    model: Any = Wishes([processor.end_id, *wanted.tolist()], processor.vocab_size_needed)
    ids = Policy(model, processor, family_of(read_model_config(str(tiny_causal)))).action_ids([], "push the cube")
    assert vocabulary.to_codes(ids).tolist() == [long, long, short, short]  # 5 + 5 + 1 + 1 of 12
    assert processor.actions_from_ids(ids).shape == (CHUNK, DIM)


def test_validation_counts_chunks_that_cannot_be_decoded(processor: Processor, movements: np.ndarray) -> None:
    codec, vocabulary = processor.codec, processor.vocabulary
    assert codec is not None
    assert vocabulary is not None
    rows = [vocabulary.to_ids(codes) for codes in codec.encode(movements[:6])]
    longest = max(map(len, rows))
    targets = torch.full((6, longest + 1), -100)
    for row, ids in enumerate(rows):
        targets[row, : len(ids)] = torch.from_numpy(ids)
        targets[row, len(ids)] = processor.end_id
    logits = torch.nn.functional.one_hot(targets.clamp(min=0), processor.vocab_size_needed).float() * 50
    sums = Sums(DIM)
    add_scores(sums, logits, targets, movements[:6], processor)
    right = sums.metrics()
    assert (right["action_undecodable"], sums.chunks) == (0, 6)
    expected = np.abs(codec.decode(codec.encode(movements[:6])) - movements[:6]).mean()
    assert right["action_mae/mean"] == pytest.approx(expected, rel=1e-4)
    lengths = codec.code_lengths
    assert lengths is not None
    other = int(np.flatnonzero(lengths != lengths[vocabulary.to_codes(rows[0][:1])[0]])[0])
    logits[0, 0] = 0
    logits[0, 0, int(vocabulary.to_ids(np.array([other]))[0])] = 50
    sums = Sums(DIM)
    add_scores(sums, logits, targets, movements[:6], processor)
    assert (sums.undecodable, sums.chunks, sums.timesteps) == (1, 5, 5 * CHUNK)


def test_tokens_that_are_no_action_are_counted_and_never_chosen(tiny_causal: Path, processor: Processor) -> None:
    assert processor.vocabulary is not None
    first = processor.vocabulary.first_id
    for wanted, violations in (([5, first], True), ([first, 5], False)):  # 5 is a piece of a word
        model: Any = Wishes(wanted, processor.vocabulary.end_id)
        policy = Policy(model, processor, family_of(read_model_config(str(tiny_causal))))
        ids = policy.action_ids([], "push the cube")
        assert set(ids.tolist()) >= {first}
        assert policy.num_violations == (len(ids) if violations else 0)
