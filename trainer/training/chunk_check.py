"""May this run compute its loss in chunks? Asked once at the start, on all ranks together: see `chunks`."""

from __future__ import annotations

import logging

import numpy as np
import torch

from stoker_proto.config import Config
from stoker_proto.processor import Processor
from stoker_proto.wire.messages import Piece
from trainer.feed.batch import BatchBuilder
from trainer.training.chunks import ChunkedHead, chunkable, find_finish, loud_head
from trainer.training.packed import make_dialogue
from trainer.training.step import Stepper

log = logging.getLogger(__name__)


def prove_chunks(stepper: Stepper, processor: Processor, config: Config) -> ChunkedHead | None:
    """The head for `Stepper.chunks`; None where no micro-batch can have enough labels, or where it cannot be done (logged)."""
    size = config.trainer.loss.chunk_labels
    if not size or config.trainer.micro_batch_size * config.data.max_seq_len <= size:
        return None
    head = stepper.engine.module.get_output_embeddings()
    reason = ""
    if head is None or not chunkable(head):
        reason = f"its head is {'none of its own' if head is None else type(head).__name__}, not a linear layer"
    elif stepper.loss is not None and not getattr(stepper.loss, "per_label", False):
        reason = f"{type(stepper.loss).__name__} does not say `per_label = True`"
    elif (finish := find_finish(stepper.engine.module.config, *_compare(stepper, processor, head))) is None:
        reason = "it does something unknown to its head's output"
    else:
        log.info("the loss is computed for %d labels at a time where a micro-batch has more", size)
        return ChunkedHead(head, finish, size)
    log.warning(
        "trainer.loss.chunk_labels is %d, but %s makes the logits of all labels at once: %s. This takes memory, and is right "
        "otherwise", size, type(stepper.engine.module).__name__, reason,
    )  # fmt: skip
    return None


def _compare(stepper: Stepper, processor: Processor, head: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(the head's output, multiplied up; the logits that the model makes of it) of a short dialogue: float[1, T, V] each."""
    ids = make_dialogue(processor, "what do you see?", "a table and two cubes")
    piece = Piece(
        ticket=0,
        loader="",
        keys=np.zeros((1, 3), np.int64),
        lengths=np.array([len(ids)], np.int32),
        input_ids=ids,
        supervised=np.ones(len(ids), np.uint8),
        image_counts=np.zeros(1, np.uint8),
        images=[],
        actions=np.zeros((1, 0, 0), np.float32),
    )
    inputs = stepper.make_inputs(BatchBuilder(decoder=processor, num_rows=1, max_tokens=len(ids))([piece]))
    module = stepper.engine.module
    was_training = module.training
    stepper.engine.eval()
    with torch.no_grad(), loud_head(head) as kept:
        logits = stepper.engine(**inputs.arguments, use_cache=False).logits
    stepper.engine.train(was_training)
    return kept[0], logits
