"""Validation sees every sample once, on any number of ranks, and equals a plain computation row by row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker_proto.config import Config, LossConfig
from stoker_proto.errors import DataError
from stoker_proto.processor import Processor
from tests.trainer.support.memory import MemoryFeed, make_config, make_processor
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import NUM_VAL, build_run
from trainer.evals.validation import validate
from trainer.feed.batch import IGNORED
from trainer.models.families import family_of, read_model_config
from trainer.training.inputs import InputMaker

pytestmark = pytest.mark.process


def validate_on(rank: int, config: Config) -> tuple[dict[str, float], str]:
    trainer = build_run(config)
    assert trainer.val is not None

    def once(num_samples: int) -> dict[str, float]:
        assert trainer.val is not None
        steps = trainer.val.feed.steps(0, 0)
        return validate(trainer.stepper, trainer.processor, steps, num_samples, trainer.val.sources)

    with pytest.raises(DataError) as caught:
        once(NUM_VAL + 1)
    metrics = once(NUM_VAL)
    assert trainer.stepper.engine.module.training, "it goes on training afterwards"
    return metrics, str(caught.value)


def plain_perplexity(config: Config) -> tuple[float, float]:
    """(perplexity, accuracy) by full logits of one row at a time."""
    processor, family = make_processor(config), family_of(read_model_config(config.model.base_model_path))
    model = family.auto_class.from_pretrained(config.model.base_model_path, dtype=torch.float32).eval()
    from tests.trainer.support.memory import make_examples

    single = make_config(Path(config.model.base_model_path), Path(config.trainer.output_dir))
    feed = MemoryFeed(make_examples(NUM_VAL, seed=2), single, processor, 0, 1)
    make_inputs = InputMaker(processor, family, torch.device("cpu"), torch.float32)
    nll, correct, tokens = 0.0, 0, 0
    for number in range(NUM_VAL):
        batch: Any = feed.batch(0, number, number + 1)
        inputs = make_inputs(batch)
        with torch.no_grad():
            logits = model(**inputs.arguments).logits[0]
        labels = torch.from_numpy(batch.labels[0])
        for position in torch.nonzero(labels != IGNORED).flatten().tolist():
            nll -= torch.log_softmax(logits[position - 1], -1)[labels[position]].item()
            correct += int(logits[position - 1].argmax() == labels[position])
            tokens += 1
    return math.exp(nll / tokens), correct / tokens


def validate_text(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """As a run with actions validates, by the logits, and as one of text does."""
    trainer = build_run(config, images=False)
    assert trainer.stepper.chunks is not None

    def once(processor: Processor) -> dict[str, float]:
        assert trainer.val is not None
        return validate(trainer.stepper, processor, trainer.val.feed.steps(0, 0), NUM_VAL, trainer.val.sources)

    expected = once(trainer.processor)
    trainer.stepper.logits = None  # type: ignore[method-assign, assignment]  # a call would fail
    return expected, once(Processor.build(config, None))


def test_validation_of_text_makes_no_logits_of_all_labels(tiny_causal: Path, tmp_path: Path) -> None:
    """A packed row of 8k tokens and a vocabulary of 152k would take 15 GB, in a run that trains with 2."""
    config = make_config(tiny_causal, tmp_path, loss=LossConfig(chunk_labels=7))
    [(expected, found)] = run_ranks(1, lambda rank: validate_text(config))
    assert found == pytest.approx({name: expected[name] for name in ("samples", "perplexity", "accuracy")}, rel=1e-6)


def begin_and_fail(rank: int, config: Config) -> bool:
    trainer = build_run(config, images=False)
    assert trainer.val is not None
    assert isinstance(trainer.train.feed, MemoryFeed)
    assert isinstance(trainer.val.feed, MemoryFeed)
    trainer.train.feed.fail_at = (0, 0)
    assert not trainer.val.feed.begun
    with pytest.raises(ConnectionError):
        trainer.run()
    return trainer.val.feed.begun


def test_validation_hears_that_training_begins(tiny_causal: Path, tmp_path: Path) -> None:
    """From then on no loader that joins may end the run, though the first validation is far away."""
    config = make_config(tiny_causal, tmp_path, eval_interval=100)
    assert run_ranks(1, lambda rank: begin_and_fail(rank, config)) == [True]


def test_two_ranks_and_one_equal_a_plain_computation(tiny_llava: Path, tmp_path: Path) -> None:
    config = make_config(tiny_llava, tmp_path)
    (two, message), (other, _) = run_ranks(2, lambda rank: validate_on(rank, config))
    [(one, _)] = run_ranks(1, lambda rank: validate_on(rank, config))
    assert two == other
    assert f"validation saw {NUM_VAL} samples where the split has {NUM_VAL + 1}" in message
    assert two["samples"] == NUM_VAL
    perplexity, accuracy = plain_perplexity(config)
    for metrics in (one, two):
        assert metrics["perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(accuracy)
        assert metrics == pytest.approx(one, rel=1e-5)
