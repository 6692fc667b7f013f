"""Checks at the start whether a model keeps the samples of a packed row apart: only some models use position ids for that.

    rows  [A B] and [B A]   ->   the logits of B must be the same in both

With position ids that restart at 0 and without a mask, most models of transformers attend within each sample only. Others accept
position ids and still attend across samples (OPT, Falcon), or carry a state from sample to sample; they would train wrongly
without any error.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from stoker_proto.text.turns import Turn
from stoker_proto.wire.messages import Piece
from trainer.feed.batch import BatchBuilder
from trainer.training.step import Stepper

_LARGEST_DIFFERENCE = 0.05
"""Mean difference of logits, as a share of their standard deviation: bf16 rounding gives 0.01, a leak gives more."""


def check_packing(stepper: Stepper, processor: Processor) -> None:
    """Run one forward of two short rows, on all ranks together. Raises ConfigError."""
    first = make_dialogue(processor, "put the red cube onto the green one", "the red cube is on the green one")
    second = make_dialogue(processor, "what do you see?", "a table and two cubes")
    ids = np.concatenate((first, second, second, first))
    piece = Piece(
        ticket=0,
        loader="",
        keys=np.zeros((4, 3), np.int64),
        lengths=np.array([len(first), len(second), len(second), len(first)], np.int32),
        input_ids=ids,
        supervised=np.ones(len(ids), np.uint8),
        image_counts=np.zeros(4, np.uint8),
        images=[],
        actions=np.zeros((4, 0, 0), np.float32),
        row_samples=np.array([2, 2], np.uint16),
    )
    batch = BatchBuilder(decoder=processor, num_rows=2, max_tokens=len(ids), packing=True)([piece])
    inputs = stepper.make_inputs(batch)
    was_training = stepper.engine.module.training
    stepper.engine.eval()
    with torch.no_grad():
        logits = stepper.logits(inputs)  # [2, P, V]
    stepper.engine.train(was_training)
    columns = np.searchsorted(inputs.positions.cpu().numpy(), np.arange(len(second) - 1))
    behind = np.searchsorted(inputs.positions.cpu().numpy(), len(first) + np.arange(len(second) - 1))
    alone, packed = logits[1, torch.from_numpy(columns)], logits[0, torch.from_numpy(behind)]
    difference = float((alone - packed).abs().mean() / alone.std())
    if not difference <= _LARGEST_DIFFERENCE:
        raise ConfigError(
            f"{type(stepper.engine.module).__name__} does not keep the samples of a packed row apart: behind another one a "
            f"sample's logits differ by {difference:.2f} standard deviations; set data.packing to false, or take another model"
        )


def make_dialogue(processor: Processor, question: str, answer: str) -> NDArray[np.int32]:
    """int32[T]: a short row for a check."""
    turns = (Turn(role="user", text=question), Turn(role="assistant", text=answer, learned=True))
    return processor.encode_turns(turns).input_ids
