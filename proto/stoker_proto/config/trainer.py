"""`trainer`: training, feeding the ranks, checkpoints and logs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from stoker_proto.config.loss import LossConfig
from stoker_proto.config.rules import above, allowed, at_least, between
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerConfig:
    """Where metrics are logged."""

    log_dir: str | None = None
    """Folder of the logs: TensorBoard writes to `{log_dir}/tensorboard`, WandB to `{log_dir}/wandb`. Default: `output_dir`."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log the same to Weights & Biases (extra `stoker[wandb]`; WANDB_MODE=offline works)."""
    wandb_project: str = "stoker"
    """Project name in Weights & Biases."""
    wandb_name: str | None = None
    """Name of the run there; default: a generated name. A resumed run continues the same run."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run there."""
    metrics: str | None = field(
        default=None,
        metadata=allowed(
            "write it as HOST:PORT, or null",
            lambda address: address is None or re.fullmatch(r"[^\s/]+:[0-9]{1,5}", address) is not None,
        ),
    )
    """The first rank serves metrics for Prometheus and loader-top at `http://HOST:PORT/metrics` (extra `stoker[metrics]`)."""
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
    discovery_s: float = field(default=5.0, metadata=at_least(0.1))
    """Seconds between two readings of the names and files in `cluster.loader_addresses`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestConfig:
    """Which validation counts as the best."""

    metric: str = field(
        metadata=allowed("write it as it is logged: val/perplexity", lambda metric: metric.startswith("val/"))
    )
    """A figure of the validation, as it is logged: `val/perplexity`, `val/action_mae/mean`. Not one of an evaluation that runs
    beside the training (`success`): its weights are gone when it is known."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether smaller or larger is better. `auto`: as is known of perplexity, accuracy, success, and errors of actions; any other
    figure needs `min` or `max`."""
    patience: int | None = field(
        default=None, metadata=allowed("at least 1, or null", lambda patience: patience is None or patience >= 1)
    )
    """Training ends early after this many validations in a row that were no better than the best one. null: never."""
    export: bool = True
    """At the end, export the weights of the best validation. false: those after the last step. The log, `summary.json` and the
    model card say which step it is. The first rank reads the checkpoint, which takes 10 bytes of host memory per parameter."""

    @property
    def larger_is_better(self) -> bool:
        """`mode`, with `auto` resolved. Raises ConfigError for a figure of which it is not known.

        >>> [BestConfig(metric=f"val/{name}").larger_is_better for name in ("accuracy/bridge", "action_mae/mean")]
        [True, False]
        """
        if self.mode != "auto":
            return self.mode == "max"
        name = self.metric.removeprefix("val/").partition("/")[0]  # without the source or the dimension
        if name.endswith(_BETTER_IF_LARGER) or name in _SUCCESS:
            return True
        if name.endswith(_BETTER_IF_SMALLER) or name.startswith("action_mae"):
            return False
        raise ConfigError(
            f"trainer.checkpoint.best.metric is {self.metric!r}, of which it is not known whether smaller or larger is better: "
            "set trainer.checkpoint.best.mode to min or max"
        )


_BETTER_IF_LARGER, _SUCCESS = ("accuracy", "reward", "return"), ("success", "success_once", "success_at_end")
_BETTER_IF_SMALLER = ("loss", "perplexity", "nll", "error", "mae", "violations", "undecodable", "outside_mass")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints, and how a run resumes."""

    interval: int = field(default=500, metadata=at_least(0))
    """Optimizer steps between two checkpoints. The last step always writes one. 0: only the last step."""
    keep: int = field(default=2, metadata=at_least(1))
    """Number of newest checkpoints to keep."""
    resume: str | None = "auto"
    """`auto`: the newest checkpoint in `output_dir`, if there is one; a checkpoint folder; or null: start a new run."""
    best: BestConfig | None = None
    """Write a checkpoint after each validation that is the best so far, and keep it beside the newest ones."""
    stop_grace_s: float = field(default=25.0, metadata=at_least(0))
    """SIGTERM during training: a rank that has not saved and ended after this time ends without. `stoker-launch` waits 20 s
    longer. DeepSpeed's launcher, where it gets the signal itself, kills its ranks after 30 s."""
    background: Literal[True, False, "auto"] = False
    """Write checkpoints beside the training: ranks copy their state to host memory, and threads write it. `auto`: where the
    copies take at most half of the free host memory. The last checkpoint of a run is always waited for."""
    universal: bool = False
    """Resume on another number of ranks, through DeepSpeed's universal checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileConfig:
    """Which steps torch's profiler records: [start, stop), counted from 1. Choose few: a trace of ten steps has 100 MB."""

    start: int = field(metadata=at_least(1))
    """The first step. The first steps of a run are slower than others."""
    stop: int = field(metadata=at_least(2))
    """The step before which recording ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroupConfig:
    """Parameters with a learning rate of their own."""

    match: tuple[str, ...] = field(metadata=allowed("write a pattern at least", bool))
    """Patterns of their names: `["*projector*"]`. A parameter belongs to the first group that matches it."""
    lr: float = field(metadata=above(0))
    """Their peak learning rate; the schedule is that of all."""
    weight_decay: float | None = field(
        default=None,
        metadata=allowed(
            "it must not be negative; null: trainer.weight_decay", lambda decay: decay is None or decay >= 0
        ),
    )
    """Their weight decay, on matrices only."""


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
    max_time: str | None = field(
        default=None,
        metadata=allowed(
            "write it as hours:minutes:seconds, e.g. 11:30:00, or null",
            lambda time: time is None or re.fullmatch(r"[0-9]{1,4}:[0-5][0-9]:[0-5][0-9]", time) is not None,
        ),
    )
    """Stop after this time of training, as `hours:minutes:seconds`: the run saves a checkpoint and ends with exit code 75. The
    same command resumes it. For queues with a time limit."""
    eval_interval: int = field(default=500, metadata=at_least(0))
    """Optimizer steps between two validations. The last step is always followed by one. 0: no validation."""
    eval_samples: int | None = field(
        default=None, metadata=allowed("at least 1, or null for all samples", lambda count: count is None or count >= 1)
    )
    """Validation samples of one validation, rounded up to whole global batches: the same ones each time. null: all of them."""
    evals: tuple[dict[str, Any], ...] = ()
    """Evaluations beside the validation, each `{type: ..., interval: ..., options}`. `type`: `success` (closed loop in a
    simulator, options in `trainer/sim/success.py`), `perplexity` (another validation), or `package.module:Class` of your own
    (`trainer/evals/interface.py`). `interval`: optimizer steps between two of them, default `eval_interval`."""
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a cosine from lr down to `min_lr_ratio` of it at the last step, or constant."""
    warmup_ratio: float = field(default=0.03, metadata=between(0, 1))
    """Share of all steps in which the learning rate rises linearly from 0."""
    min_lr_ratio: float = field(default=0.0, metadata=between(0, 1))
    """Learning rate at the end of the cosine, as a share of lr."""
    weight_decay: float = field(default=0.0, metadata=at_least(0))
    """Weight decay of AdamW, on matrices only (not on biases and norms)."""
    betas: tuple[float, float] = field(
        default=(0.9, 0.95),
        metadata=allowed("both must lie in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas)),
    )
    """Betas of AdamW."""
    optimizer: Literal["adamw", "adamw_fused"] = "adamw"
    """`adamw_fused`: PyTorch's fused kernel, one pass over each parameter; its rounding differs in the last bits."""
    parameter_groups: tuple[ParameterGroupConfig, ...] = ()
    """Parameters with a learning rate of their own. All others have `lr`."""
    ema_decay: float = field(default=0.0, metadata=allowed("it must lie in [0, 1)", lambda decay: 0 <= decay < 1))
    """Above 0: keep an average of the weights, `ema = decay * ema + (1 - decay) * weights` after each applied step, and export
    it. Validation scores the weights themselves. Costs 4 bytes per parameter over all ranks."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Number format in which ranks add gradients up. `bf16` halves the traffic and loses digits: sums of many ranks round."""
    grad_clip: float = field(default=1.0, metadata=at_least(0))
    """Largest gradient norm over all parameters; 0: no clipping."""
    max_skipped_steps: int = field(default=20, metadata=at_least(0))
    """The run ends after this many consecutive steps whose gradient norm is not finite; such steps are not applied."""
    collective_timeout_s: float = field(default=1800.0, metadata=above(0))
    """A rank that waits longer than this for another one in a collective operation ends with an error. It must be longer than
    what one rank alone does: writing an export, preparing a resume."""
    worst_steps: int = field(default=32, metadata=at_least(0))
    """Keep the rows' losses of so many steps, those whose loss rose most; `stoker-batch --worst-loss` names their samples."""
    seed: int = 0
    """Seed of dropout and of newly initialised weights."""
    output_dir: str = "outputs"
    """Folder for checkpoints, logs and the exported model."""
    export: bool = True
    """At the end, write a model that transformers loads to `{output_dir}/export`."""
    zero_stage: Literal[1, 2, 3, "auto"] = 3
    """DeepSpeed ZeRO stage. `auto`: 1 where weights, gradients and a rank's share of the optimizer states take at most half of
    the free memory, as it partitions less and is faster (3 costs 30% more on one CPU rank); otherwise 3. A resumed run keeps
    its checkpoint's."""
    offload: bool = False
    """Keep optimizer states in host memory: 2.7-4 times slower, for models that do not fit otherwise."""
    loss: LossConfig = field(default_factory=LossConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    profile: ProfileConfig | None = None
    """Record some steps with torch's profiler, in `{output_dir}/profile`; null: none."""
    feed: FeedConfig = field(default_factory=FeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)


def seconds_of(time: str) -> int:
    """Seconds of a time `hours:minutes:seconds`.

    >>> seconds_of("1:02:03")
    3723
    """
    hours, minutes, seconds = map(int, time.split(":"))
    return 3600 * hours + 60 * minutes + seconds


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
