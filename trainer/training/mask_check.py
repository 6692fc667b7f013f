"""What a model's attention sees, asked once at the start, on all ranks together: later tokens, and the padding?

Rows are padded on the right. If no token attends to later ones, padding at the end changes nothing. Without a mask PyTorch takes
its fast causal kernel. It makes no dense mask [B, 1, T, T] and reads none on the host.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch

from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from stoker_proto.wire.messages import Piece
from trainer.feed.batch import BatchBuilder
from trainer.training.inputs import Inputs
from trainer.training.packed import make_dialogue
from trainer.training.step import Stepper

log = logging.getLogger(__name__)

_SHARES = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of logits, as a share of their standard deviation, that is rounding: another kernel adds up otherwise."""


def refuse_seeing_ahead(stepper: Stepper, processor: Processor) -> None:
    """Raises ConfigError for a model whose tokens see later ones: it would read the very tokens that it should predict, so its
    loss would fall, and it could generate nothing.

    Two forwards of a row, which differ in its last token: no logits before it may differ.
    """
    if not stepper.make_inputs.family.causal:
        return
    inputs = _inputs(stepper, processor)
    ids = inputs.arguments["input_ids"].clone()
    ids[0, -1] = ids[0, 0] if ids[0, -1] != ids[0, 0] else ids[0, 1]  # row 0 is the longest
    changed = replace(inputs, arguments={**inputs.arguments, "input_ids": ids})
    difference = _difference(stepper, inputs, changed, is_compared=inputs.targets[:1] >= 0)
    if difference > _SHARES[stepper.make_inputs.dtype]:
        raise ConfigError(
            f"{type(stepper.engine.module).__name__} lets tokens see later ones: its logits change by {difference:.2g} of their "
            "standard deviation with a token behind them, so it would read what it should predict. Take a model that generates "
            "text; of BERT's kind set is_decoder in its config.json, of Gemma's use_bidirectional_attention to false"
        )


def needs_no_mask(stepper: Stepper, processor: Processor) -> bool:
    """Run two forwards of a long and a short row: whether the mask changes none of their logits."""
    if not stepper.make_inputs.family.causal:
        return False
    inputs = _inputs(stepper, processor)
    bare = {name: value for name, value in inputs.arguments.items() if name != "attention_mask"}
    difference = _difference(stepper, inputs, replace(inputs, arguments=bare), is_compared=inputs.targets >= 0)
    same = difference <= _SHARES[stepper.make_inputs.dtype]
    log.info(
        "padding is %s (the largest difference of logits without a mask is %.2g of their standard deviation)",
        "not masked, as nothing sees it" if same else "masked", difference,
    )  # fmt: skip
    return same


def _inputs(stepper: Stepper, processor: Processor) -> Inputs:
    """A long and a short row of text, whose tokens are all labels."""
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
    return stepper.make_inputs(BatchBuilder(decoder=processor, num_rows=2, max_tokens=len(ids))([piece]))


def _difference(stepper: Stepper, one: Inputs, other: Inputs, *, is_compared: torch.Tensor) -> float:
    """The largest difference of logits, as a share of their standard deviation. is_compared: bool[b, P], of the first b rows."""
    was_training = stepper.engine.module.training
    stepper.engine.eval()
    with torch.no_grad():
        first, second = (stepper.logits(inputs)[: len(is_compared)][is_compared] for inputs in (one, other))  # [n, V]
    stepper.engine.train(was_training)
    return float((first - second).abs().max() / first.std())
