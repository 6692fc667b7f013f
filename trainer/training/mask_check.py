"""Does a model need a mask of the padding? Asked once at the start, on all ranks together.

Rows are padded on the right. If no token attends to later ones, padding at the end changes nothing. Without a mask PyTorch takes
its fast causal kernel. It makes no dense mask [B, 1, T, T] and reads none on the host.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from stoker_proto.processor import Processor
from stoker_proto.wire.messages import Piece
from trainer.feed.batch import BatchBuilder
from trainer.training.packed import make_dialogue
from trainer.training.step import Stepper

log = logging.getLogger(__name__)

_SHARES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of logits, as a share of their standard deviation, that is rounding: another kernel adds up otherwise."""


def needs_no_mask(stepper: Stepper, processor: Processor) -> bool:
    """Run two forwards of a long and a short row: whether the mask changes none of their logits."""
    if not stepper.make_inputs.family.causal:
        return False
    rows = [
        make_dialogue(processor, "put the red cube onto the green one", "the red cube is on the green one"),
        make_dialogue(processor, "yes or no?", "no"),
    ]
    ids = np.concatenate(rows)
    piece = Piece(
        ticket=0,
        loader="",
        keys=np.zeros((2, 3), np.int64),
        lengths=np.array([len(row) for row in rows], np.int32),
        input_ids=ids,
        supervised=np.ones(len(ids), np.uint8),
        image_counts=np.zeros(2, np.uint8),
        images=[],
        actions=np.zeros((2, 0, 0), np.float32),
    )
    inputs = stepper.make_inputs(BatchBuilder(decoder=processor, num_rows=2, max_tokens=len(ids))([piece]))
    bare = {name: value for name, value in inputs.arguments.items() if name != "attention_mask"}
    was_training = stepper.engine.module.training
    stepper.engine.eval()
    with torch.no_grad():
        with_mask, without = stepper.logits(inputs), stepper.logits(replace(inputs, arguments=bare))  # [2, P, V] each
    stepper.engine.train(was_training)
    is_label = inputs.targets >= 0
    difference = (with_mask - without)[is_label].abs().max() / with_mask[is_label].std()
    same = bool(difference <= _SHARES[stepper.make_inputs.dtype])
    log.info(
        "padding is %s (the largest difference of logits without a mask is %.2g of their standard deviation)",
        "not masked, as nothing sees it" if same else "masked", float(difference),
    )  # fmt: skip
    return same
