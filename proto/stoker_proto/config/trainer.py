"""`trainer`: how it is trained, fed and kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stoker_proto.config.rules import above, allowed, at_least, between
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerConfig:
    """Where figures go."""

    tensorboard: bool = True
    """Write TensorBoard event files to `{output_dir}/tensorboard`."""
    wandb: bool = False
    """Log the same to Weights & Biases (extra `stoker[wandb]`; WANDB_MODE=offline works)."""
    wandb_project: str = "stoker"
    """Project name there."""
    log_interval: int = field(default=1, metadata=at_least(1))
    """Steps between two lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedConfig:
    """How a rank pulls its micro-batches."""

    prefetch: int = field(default=8, metadata=at_least(1))
    """Micro-batches asked for ahead of the one that trains: the credit window."""
    ticket_deadline_s: float = field(default=10.0, metadata=above(0))
    """A piece not here after this time is asked from another loader; sooner, down to 1 s, once the loaders' latency is known."""
    hedge_share: float = field(default=0.05, metadata=between(0, 1))
    """Of the tickets, how many may be asked of a second loader because the first is unusually slow; 0: none."""
    hedge_multiple: float = field(default=3.0, metadata=at_least(1))
    """Unusually slow: so many times the latency to be expected, and 0.2 s at least."""
    takeover_ratio: float = field(
        default=3.0, metadata=allowed("it must be above 1, or 0 for no takeover", lambda ratio: ratio == 0 or ratio > 1)
    )
    """An idle loader so many times faster takes lanes over from an overloaded one, for a time; 0: never."""
    backoff_s: float = field(default=60.0, metadata=at_least(0))
    """A loader that comes and goes is home to no lanes for up to this time after it came back; 0: for none."""
    data_deadline_s: float = field(default=120.0, metadata=above(0))
    """A rank without data for this long ends with a message and a non-zero exit."""
    connect_deadline_s: float = field(default=60.0, metadata=above(0))
    """Loaders that together hold all the data must have answered after this time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What is kept for a resume."""

    interval: int = field(default=500, metadata=at_least(0))
    """Optimizer steps between two checkpoints; one is always written at the end. 0: only at the end."""
    keep: int = field(default=2, metadata=at_least(1))
    """Newest checkpoints that are kept."""
    resume: str | None = "auto"
    """`auto`: the newest in `output_dir`, if there is one; a checkpoint folder; or null to start anew."""
    universal: bool = False
    """Resume on another number of ranks, through DeepSpeed's universal checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """How it is trained."""

    micro_batch_size: int = field(metadata=at_least(1))
    """Rows of one forward on one rank."""
    global_batch_size: int = field(metadata=at_least(1))
    """Rows of one optimizer step over all ranks: micro_batch_size x ranks x accumulation."""
    lr: float = field(metadata=above(0))
    """Peak learning rate of AdamW."""
    epochs: int = field(default=1, metadata=at_least(1))
    """Passes over the training data."""
    max_steps: int | None = field(
        default=None, metadata=allowed("at least 1, or null for all epochs", lambda steps: steps is None or steps >= 1)
    )
    """Stop after this many optimizer steps, if that is before the last epoch's end."""
    eval_interval: int = field(default=500, metadata=at_least(0))
    """Optimizer steps between two validations; one is always made at the end. 0: never."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: cosine down to `min_lr_ratio` of lr at the last step, or constant."""
    warmup_ratio: float = field(default=0.03, metadata=between(0, 1))
    """Share of all steps during which the rate rises linearly from 0."""
    min_lr_ratio: float = field(default=0.0, metadata=between(0, 1))
    """Where the cosine ends, as a share of lr."""
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    """AdamW's, on matrices only (not on biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    grad_clip: float = field(default=1.0, metadata=at_least(0))
    """Largest gradient norm over all parameters; 0: no clipping."""
    max_skipped_steps: int = field(default=20, metadata=at_least(0))
    """Steps in a row with a non-finite gradient norm (skipped, counted) after which the run ends."""
    seed: int = 0
    """Of dropout and of newly made weights."""
    output_dir: str = "outputs"
    """Checkpoints, logs and the exported model."""
    export: bool = True
    """Write a model that transformers loads to `{output_dir}/export` at the end."""
    zero_stage: Literal[1, 2, 3] = 3
    """DeepSpeed ZeRO stage."""
    offload: bool = False
    """Keep optimizer states in host memory: 2.7-4 times slower, for models that do not fit otherwise."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def check_batch_arithmetic(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Micro-batches that a rank accumulates per step; ConfigError where the global batch does not divide.

    >>> check_batch_arithmetic(64, 4, 8)
    2
    """
    per_pass = micro_batch_size * world_size
    if global_batch_size % per_pass == 0:
        return global_batch_size // per_pass
    below, above = global_batch_size // per_pass * per_pass, -(-global_batch_size // per_pass) * per_pass
    nearest = " or ".join(str(size) for size in (below, above) if size)
    raise ConfigError(
        f"trainer.global_batch_size is {global_batch_size}, but micro_batch_size {micro_batch_size} x {world_size} trainer "
        f"ranks = {per_pass} rows a pass: the global batch must be a multiple of that, e.g. {nearest}"
    )
