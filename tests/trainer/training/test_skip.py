"""A step whose gradient norm is not finite changes nothing, on no rank; a global batch without labels neither."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import build_run
from trainer.feed.batch import IGNORED

pytestmark = pytest.mark.process


def state_of(engine: Any) -> list[torch.Tensor]:
    """This rank's part of weights, master weights and optimizer states, copied."""
    inner = engine.optimizer.optimizer
    tensors = [getattr(p, "ds_tensor", p).detach() for p in engine.module.parameters()]
    tensors += [p.detach() for group in inner.param_groups for p in group["params"]]
    tensors += [value for state in inner.state.values() for value in state.values() if torch.is_tensor(value)]
    return [tensor.clone() for tensor in tensors]


def break_one_rank(rank: int, config: Any) -> dict[str, Any]:
    trainer = build_run(config, images=False)
    stepper = trainer.stepper
    steps = [step.micro_batches for step in trainer.train.feed.steps(0, 0)]
    found: dict[str, Any] = {"first": stepper.step(steps[0], 0)}
    before = state_of(stepper.engine)

    forward = stepper._forward
    if rank == 1:
        stepper._forward = lambda inputs: (forward(inputs)[0] * math.inf, None)  # type: ignore[method-assign]
    found["broken"] = stepper.step(steps[1], 1)
    stepper._forward = forward  # type: ignore[method-assign]
    found["unchanged"] = all(map(torch.equal, before, state_of(stepper.engine)))

    for batch in steps[2]:
        batch.labels[:] = IGNORED
        batch.num_supervised = 0
    found["empty"] = stepper.step(steps[2], 2)
    found["still unchanged"] = all(map(torch.equal, before, state_of(stepper.engine)))

    found["after"] = stepper.step(steps[1], 1)
    found["changed"] = not all(map(torch.equal, before, state_of(stepper.engine)))
    return found


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (3, "bf16"),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((3, "fp32"), (2, "fp32"), (2, "bf16"), (1, "bf16"))),
    ],
)
def test_one_rank_with_a_gradient_that_is_not_finite(
    stage: int, precision: str, tiny_causal: Path, tmp_path: Path
) -> None:
    config = make_config(tiny_causal, tmp_path, zero_stage=stage, precision=precision, weight_decay=0.1)
    for found in run_ranks(2, lambda rank: break_one_rank(rank, config)):
        assert found["first"].applied
        assert not found["broken"].applied
        assert not math.isfinite(found["broken"].grad_norm)
        assert found["unchanged"], "neither weights nor optimizer states, although weights decay"
        assert not found["empty"].applied
        assert found["empty"].num_supervised == 0
        assert found["still unchanged"]
        assert found["after"].applied
        assert found["changed"]


def test_too_many_skipped_steps_end_the_run(tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, max_skipped_steps=2, export=False)

    def work(rank: int) -> tuple[str, int]:
        trainer = build_run(config, images=False)
        forward = trainer.stepper._forward
        trainer.stepper._forward = lambda inputs: (forward(inputs)[0] * math.nan, None)  # type: ignore[method-assign]
        with pytest.raises(ConfigError) as caught:
            trainer.run()
        return str(caught.value), trainer.cursor.skipped_steps

    [(message, skipped)] = run_ranks(1, work)
    assert skipped == 3
    assert "trainer.max_skipped_steps = 2: lower trainer.lr" in message
