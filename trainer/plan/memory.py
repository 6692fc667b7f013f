"""Bytes that a rank holds, and bytes of a checkpoint: arithmetic on the sizes of a model's parameters.

bytes per parameter (n all, t trained, N ranks)      weights           gradients            optimizer states
stage 0 (not a value of trainer.zero_stage)          b n               4 t (bf16: 6 t)      12 t (fp32: 8 t)
stage 1                                              b n               4 t (bf16: 6 t)      12 t / N
stage 2                                              b n               4 t / N              12 t / N
stage 3                                              b n / N           4 t / N              12 t / N

b: 2 in bf16, 4 in fp32. DeepSpeed keeps a second copy of the weights beside AdamW's two moments in fp32, too, where weights are
partitioned or flat; `trainer.ema_decay` adds 4 t / N. Stage 1 keeps gradients whole until the last micro-batch of a step, in bf16
beside a copy in fp32. Under stage 3 parameters of at most 10 x width numbers are whole on each rank. The tests compare this with
what DeepSpeed 0.19 holds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from stoker_proto.config import Config
from trainer.plan.shape import ModelShape

STAGES = (0, 1, 2, 3)
_FLOAT = 4
"""Bytes of a number in fp32."""
_MOMENTS = 2 * _FLOAT
_ALIGNMENT = 2
"""Below stage 3 a group is padded to a multiple of this times the number of ranks (DeepSpeed's `nccl_start_alignment_factor`)."""
_PERSISTENT_PER_WIDTH = 10
"""As `stage3_param_persistence_threshold` in `trainer.engine.zero`."""
_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size` below stage 3, in numbers."""
_LIVE = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`, in numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    working: int
    """At most: buckets of gradients on their way, and under stage 3 parameters that were fetched for a layer."""
    activations: int | None
    """What a forward keeps for the backward; None: not known."""
    logits: int
    host: int
    """Of `gradients` and `optimizer`, what `trainer.offload` moves to the machine's memory. Both are 0 then."""

    @property
    def total(self) -> int:
        """On the device."""
        return (
            self.weights + self.gradients + self.optimizer + self.working + (self.activations or 0) + self.logits
        )  # fmt: skip

    def to_json(self) -> dict[str, int | None]:
        """All figures and the total."""
        return {**asdict(self), "total": self.total}


def memory_of_rank(
    shape: ModelShape, config: Config, *, stage: int, world_size: int, activations: int | None, logits: int
) -> RankMemory:
    """The memory of the rank that holds most. activations, logits: bytes, the same at each stage."""
    width = 2 if config.model.precision == "bf16" else _FLOAT
    states = _MOMENTS + (_FLOAT if config.trainer.ema_decay else 0)
    if stage == 3:
        weights, share = _partitioned(shape, world_size)
        weights *= width
        live = min(shape.num_parameters, _LIVE) * width
        gradients, optimizer = share * _FLOAT, share * (_FLOAT + states)
        working = max(shape.width**2, 1 << 20) * _FLOAT + (live if world_size > 1 else 0)
    else:
        whole = sum(_padded(sum(group), _ALIGNMENT * world_size) for group in shape.trained)
        share = whole if stage == 0 else whole // world_size
        has_copy = stage > 0 or width < _FLOAT
        weights = (whole + sum(shape.frozen)) * width
        gradients = share * _FLOAT if stage == 2 else whole * (_FLOAT if width == _FLOAT else width + _FLOAT)
        optimizer = share * (states + (_FLOAT if has_copy else 0))
        working = min(shape.num_trained, _BUCKET) * _FLOAT if world_size > 1 else 0
    host = 0
    if config.trainer.offload and stage > 0:
        host = optimizer + (gradients if stage > 1 else 0)
        optimizer, gradients = 0, 0 if stage > 1 else gradients
    return RankMemory(
        weights=weights + shape.buffer_bytes, gradients=gradients, optimizer=optimizer, working=working,
        activations=activations, logits=logits, host=host,
    )  # fmt: skip


def _partitioned(shape: ModelShape, world_size: int) -> tuple[int, int]:
    """Under stage 3: (numbers of all parameters on a rank, numbers of the trained ones in its partition)."""
    trained = [size for group in shape.trained for size in group]
    shares = {size: -(-size // world_size) for size in {*trained, *shape.frozen}}
    own = sum(shares[size] for size in (*trained, *shape.frozen))
    small = [size for size in (*trained, *shape.frozen) if size <= _PERSISTENT_PER_WIDTH * shape.width]
    whole = sum(small) if world_size > 1 else 0  # one rank's partition is whole itself
    return own + whole, sum(shares[size] for size in trained)


def checkpoint_bytes(shape: ModelShape, config: Config, *, stage: int) -> int:
    """Of one checkpoint, over all ranks: weights in the model's format below stage 3, and the optimizer's states in fp32.

    With adapters only these are saved.
    """
    width = 2 if config.model.precision == "bf16" else _FLOAT
    states = _FLOAT + _MOMENTS + (_FLOAT if config.trainer.ema_decay else 0)
    saved = shape.num_trained if config.model.lora is not None else shape.num_parameters
    return shape.num_trained * states + (saved * width if stage < 3 else 0)


def logit_bytes(num_labels: int, vocabulary: int, precision: str) -> int:
    """Bytes of one micro-batch: logits, their copy in fp32, the softmax and the gradients of both."""
    each = 3 * _FLOAT if precision == "fp32" else 3 * _FLOAT + 2 * 2
    return num_labels * vocabulary * each


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
