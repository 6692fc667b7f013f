"""Checkpoints of a model with frozen tensors: resumed bit-equal, on another number of ranks, and at another ZeRO stage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from stoker_proto.config import Config
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import digests, run, weights

pytestmark = pytest.mark.process
CHECKPOINT = {"interval": 3, "keep": 10}


@pytest.mark.parametrize("zero_stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_as_if_nothing_had_been(zero_stage: int, tiny_openvla: Path, tmp_path: Path) -> None:
    """Four steps an epoch, a checkpoint after three; killed in the second epoch, after five. Then one rank resumes alone."""
    straight, killed, alone = (tmp_path / name for name in ("straight", "killed", "alone"))

    def config(folder: Path, **checkpoint: bool) -> Config:
        keys = {**CHECKPOINT, **checkpoint}
        return make_config(tiny_openvla, folder, epochs=2, weight_decay=0.1, checkpoint=keys, zero_stage=zero_stage)

    run_ranks(2, lambda rank: run(config(straight)))
    run_ranks(2, lambda rank: run(config(killed), fail_at=(1, 8)))
    run_ranks(2, lambda rank: run(config(killed)))
    expected, found = digests(straight), digests(killed)
    assert [line["step"] for line in expected] == list(range(1, 9))
    assert found == expected[:5] + expected[3:]
    before, one, other = weights(tiny_openvla), weights(straight / "export"), weights(killed / "export")
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert sum(torch.equal(one[name], before[name]) for name in before) == 43, "the unused ones"

    shutil.copytree(straight / "checkpoints" / "step-00000003", alone / "checkpoints" / "step-00000003")
    run_ranks(1, lambda rank: run(config(alone, universal=True)))
    losses = {line["step"]: line["loss"] for line in digests(alone)}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in expected[3:]}, abs=1e-5)
    third = weights(alone / "export")
    assert sum(torch.equal(third[name], before[name]) for name in before) == 43
