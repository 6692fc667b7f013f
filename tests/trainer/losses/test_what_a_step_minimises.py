"""A step of the robot policy: the objective is minimised, the NLL is reported, and the estimates learn the true positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from stoker_proto.config import LossConfig
from stoker_proto.processor import Processor
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Piece
from tests.trainer.models.test_robot import SIZES, processor_of
from trainer.engine.ranks import Ranks
from trainer.feed.batch import BatchBuilder, MicroBatch
from trainer.models.families import family_of, read_model_config
from trainer.models.tiny import build_tiny
from trainer.training.inputs import InputMaker
from trainer.training.objective import Objective
from trainer.training.source_table import SourceTable
from trainer.training.step import Stepper

CPU = torch.device("cpu")
ROWS = 3


class PlainEngine(torch.nn.Module):
    """An engine of one rank and one micro-batch: torch's own backward and AdamW."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
        self.minimised: list[float] = []

    def forward(self, **arguments: Any) -> Any:
        return self.module(**arguments)

    def backward(self, loss: torch.Tensor, *, scale_wrt_gas: bool) -> None:
        self.minimised.append(float(loss.detach()))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.optimizer.step()

    def get_global_grad_norm(self) -> float:
        return 1.0

    def was_step_applied(self) -> bool:
        return True


def batch_of(processor: Processor) -> MicroBatch:
    """Three rows whose true positions follow from their pictures, through the wire."""
    rng = np.random.default_rng(5)
    actions = rng.uniform(-0.9, 0.9, (ROWS, 1, 3)).astype(np.float32)
    assert processor.codec is not None
    codes = processor.codec.encode(actions)
    rows = [
        processor.encode("push the cube", 2, codes=codes[row], state=rng.uniform(-1, 1, 3).astype(np.float32))
        for row in range(ROWS)
    ]
    frames = rng.integers(0, 256, (2 * ROWS, 16, 16, 3), dtype=np.uint8)
    piece = Piece(
        ticket=0, loader="memory", keys=np.array([[0, row, 0] for row in range(ROWS)], np.int64),
        lengths=np.array([len(row.input_ids) for row in rows], np.int32),
        input_ids=np.concatenate([row.input_ids for row in rows]).astype(np.int32),
        supervised=np.concatenate([row.supervised for row in rows]).astype(np.uint8),
        image_counts=np.full(ROWS, 2, np.uint8), images=[processor.encode_image(frame, None) for frame in frames],
        actions=actions, auxiliary=rng.uniform(-0.3, 0.3, (ROWS, 6)).astype(np.float32),
    )  # fmt: skip
    received = encoding.decode(encoding.encode(piece))
    assert isinstance(received, Piece)
    return BatchBuilder(decoder=processor, num_rows=4, max_tokens=96)([received])  # the fourth row is padding


@pytest.mark.long
@pytest.mark.usefixtures("one_rank")
def test_the_objective_is_minimised_and_the_nll_reported(tmp_path: Path) -> None:
    build_tiny("robot", tmp_path / "robot", image_size=16, robot=SIZES)
    family = family_of(read_model_config(str(tmp_path / "robot")))
    model = family.auto_class.from_pretrained(tmp_path / "robot", dtype=torch.float32)
    processor = processor_of(tmp_path / "robot", tmp_path)
    batch = batch_of(processor)
    assert np.isnan(batch.auxiliary[3]).all()
    loss = LossConfig(type="ordinal", sigma_bins=1.0, auxiliary_weight=4.0)
    engine = PlainEngine(model)
    ranks = Ranks(rank=0, world_size=1, local_rank=0, device=CPU)
    stepper = Stepper(
        engine, InputMaker(processor, family, CPU, torch.float32), ranks, 0, SourceTable(("memory",), (0,), (1,)),
        Objective.of(loss, processor),
    )  # fmt: skip
    inputs = stepper.make_inputs(batch)
    with torch.no_grad():
        output = model(**inputs.arguments, logits_to_keep=inputs.positions)
        nll = torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), inputs.targets.flatten(), ignore_index=-100
        )
        far = float((output.auxiliary[:ROWS] - inputs.auxiliary[:ROWS]).abs().mean())
    results = [stepper.step([batch], index) for index in range(40)]
    assert results[0].loss == pytest.approx(float(nll), rel=1e-4)
    assert engine.minimised[0] > float(nll) + 1  # the auxiliary loss of random estimates comes on top
    assert engine.minimised[-1] < engine.minimised[0] / 2
    with torch.no_grad():
        estimates = model(**inputs.arguments, logits_to_keep=inputs.positions).auxiliary
    assert float((estimates[:ROWS] - inputs.auxiliary[:ROWS]).abs().mean()) < far / 3


@pytest.fixture
def one_rank() -> Any:
    """A process group of one, as `join_ranks` makes it."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield
    if made:
        dist.destroy_process_group()
