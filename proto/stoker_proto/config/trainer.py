"""`trainer`: training, feeding the ranks, checkpoints and logs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stoker_proto.config.rules import above, allowed, at_least, between
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerConfig:
    """Where metrics are logged."""

    tensorboard: bool = True
    """Write TensorBoard event files to `{output_dir}/tensorboard`."""
    wandb: bool = False
    """Log the same to Weights & Biases (extra `stoker[wandb]`; WANDB_MODE=offline works)."""
    wandb_project: str = "stoker"
    """Project name in Weights & Biases."""
    log_interval: int = field(default=1, metadata=at_least(1))
    """Optimizer steps between two log lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedConfig:
    """How a rank pulls its micro-batches."""

    prefetch: int = field(default=8, metadata=at_least(1))
    """Micro-batches requested ahead of the one that trains: the credit window."""
    ticket_deadline_s: float = field(default=10.0, metadata=above(0))
    """After this time a missing piece is requested from another loader. Once the loaders' latency is known the deadline is
    shorter, but at least 1 s."""
    hedge_share: float = field(default=0.05, metadata=between(0, 1))
    """Share of the tickets that may go to a second loader because the first is unusually slow. 0: none."""
    hedge_multiple: float = field(default=3.0, metadata=at_least(1))
    """A loader is unusually slow after this many times the expected latency, and after at least 0.2 s."""
    takeover_ratio: float = field(
        default=3.0, metadata=allowed("it must be above 1, or 0 for no takeover", lambda ratio: ratio == 0 or ratio > 1)
    )
    """An idle loader takes over lanes of an overloaded one, for a time, if it is this many times faster. 0: never."""
    backoff_s: float = field(default=60.0, metadata=at_least(0))
    """A loader that fails repeatedly gets no lanes for up to this time after its return. 0: it gets them at once."""
    data_deadline_s: float = field(default=120.0, metadata=above(0))
    """A rank that gets no data for this long ends with an error and a non-zero exit code."""
    connect_deadline_s: float = field(default=60.0, metadata=above(0))
    """Within this time, loaders that together hold all the data must have answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, and how a run resumes."""

    interval: int = field(default=500, metadata=at_least(0))
    """Optimizer steps between two checkpoints. The last step always writes one. 0: only the last step."""
    keep: int = field(default=2, metadata=at_least(1))
    """Number of newest checkpoints to keep."""
    resume: str | None = "auto"
    """`auto`: the newest checkpoint in `output_dir`, if there is one; a checkpoint folder; or null: start a new run."""
    universal: bool = False
    """Resume on another number of ranks, through DeepSpeed's universal checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerConfig:
    """The training itself."""

    micro_batch_size: int = field(metadata=at_least(1))
    """Rows of one forward pass on one rank."""
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
    """Optimizer steps between two validations. The last step is always followed by one. 0: no validation."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine from lr down to `min_lr_ratio` of it at the last step, or constant."""
    warmup_ratio: float = field(default=0.03, metadata=between(0, 1))
    """Share of all steps in which the learning rate rises linearly from 0."""
    min_lr_ratio: float = field(default=0.0, metadata=between(0, 1))
    """Learning rate at the end of the cosine, as a share of lr."""
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    """Weight decay of AdamW, on matrices only (not on biases and norms)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Betas of AdamW."""
    grad_clip: float = field(default=1.0, metadata=at_least(0))
    """Largest gradient norm over all parameters; 0: no clipping."""
    max_skipped_steps: int = field(default=20, metadata=at_least(0))
    """The run ends after this many consecutive steps whose gradient norm is not finite; such steps are not applied."""
    worst_steps: int = field(default=32, metadata=at_least(0))
    """Keep the rows' losses of so many steps, those whose loss rose most; `stoker-batch --worst-loss` names their samples."""
    seed: int = 0
    """Seed of dropout and of newly initialised weights."""
    output_dir: str = "outputs"
    """Folder for checkpoints, logs and the exported model."""
    export: bool = True
    """At the end, write a model that transformers loads to `{output_dir}/export`."""
    zero_stage: Literal[1, 2, 3] = 3
    """DeepSpeed ZeRO stage."""
    offload: bool = False
    """Keep optimizer states in host memory: 2.7-4 times slower, for models that do not fit otherwise."""
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    feed: FeedConfig = field(default_factory=FeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def check_batch_arithmetic(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """The micro-batches that a rank accumulates per step. Raises ConfigError where the global batch does not divide.

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
