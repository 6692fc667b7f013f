"""The optimizer: AdamW's parameter groups, the average of the weights, and the learning rate as a pure function of the step.

There is no scheduler object: nothing to save, and nothing that drifts after a step that was not applied or after a resume.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stoker_proto.config import ParameterGroupConfig, TrainerConfig
from stoker_proto.errors import ConfigError

EMA = "ema"
"""Name of the average in the optimizer's state."""


def count_steps(config: TrainerConfig, num_samples: int) -> int:
    """Optimizer steps of the whole run, with `num_samples` in an epoch."""
    steps = config.epochs * -(-num_samples // config.global_batch_size)
    return min(steps, config.max_steps or steps)


def shortfall(config: TrainerConfig, num_samples: int) -> str:
    """Text for the log where the epochs end before `max_steps`, which other trainers would repeat the data for; otherwise ""."""
    steps = count_steps(config, num_samples)
    if config.max_steps is None or steps >= config.max_steps:
        return ""
    return (
        f"trainer.max_steps is {config.max_steps}, but trainer.epochs = {config.epochs} over {num_samples} samples end after "
        f"{steps} steps; for more, set trainer.epochs to {-(-config.max_steps * config.epochs // steps)}"
    )


def learning_rate(config: TrainerConfig, step: int, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of `total_steps`.

    Warm-up over w = ceil(warmup_ratio * total_steps) steps: lr/w, 2lr/w, ..., lr. Then constant, or a half cosine that
    reaches min_lr_ratio * lr exactly at the last step.
    """
    update, warmup = step + 1, math.ceil(config.warmup_ratio * total_steps)
    if update <= warmup:
        return config.lr * update / warmup
    if config.lr_schedule == "constant":
        return config.lr
    progress = min(1.0, (update - warmup) / max(1, total_steps - warmup))
    share = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * share


def make_optimizer(model: torch.nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """torch's AdamW over the model's trained parameters. Raises ConfigError for a group that matches none."""
    groups = parameter_groups(model, config.weight_decay, config.parameter_groups, config.lr)
    if not groups:
        raise ConfigError("model.freeze leaves no parameter to train: take a pattern out")
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas}
    if config.optimizer == "adamw_fused":
        options["fused"] = True
    if config.ema_decay:
        return AveragingAdamW(groups, ema_decay=config.ema_decay, **options)
    return torch.optim.AdamW(groups, **options)


def parameter_groups(
    model: torch.nn.Module, weight_decay: float, own: Sequence[ParameterGroupConfig] = (), lr: float = 1.0
) -> list[dict[str, Any]]:
    """AdamW's groups: those of `own` last, each in two: matrices decay, vectors (biases, norms) do not.

    `lr_scale` of a group is its peak learning rate over that of all, `lr`. Under ZeRO-3 a parameter is a placeholder of size 0
    here; `ds_shape` holds its true shape.
    """
    groups = _two_groups(weight_decay, 1.0)
    for config in own:
        groups += _two_groups(weight_decay if config.weight_decay is None else config.weight_decay, config.lr / lr)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            number = next((n + 1 for n, config in enumerate(own) if matches(name, config.match)), 0)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups[2 * number + (len(shape) < 2)]["params"].append(parameter)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for n, config in enumerate(own):
        empty = [pattern for pattern in config.match if not any(matches(name, (pattern,)) for name in trained)]
        if empty or not any(group["params"] for group in groups[2 * n + 2 : 2 * n + 4]):
            reason = (
                f"{empty[0]!r} matches no trained parameter" if empty else "an earlier group has all that it matches"
            )
            raise ConfigError(
                f"trainer.parameter_groups[{n}].match is {list(config.match)}: {reason}; names begin with "
                f"{', '.join(beginnings(trained)[:12])}, and * stands for any part"
            )
    return [group for group in groups if group["params"]]


def _two_groups(weight_decay: float, lr_scale: float) -> list[dict[str, Any]]:
    return [{"params": [], "weight_decay": decay, "lr_scale": lr_scale} for decay in (weight_decay, 0.0)]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a pattern, in which * stands for any part, is the whole name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def beginnings(names: Sequence[str]) -> list[str]:
    """The first two parts of dotted names, ascending, for messages."""
    return sorted({".".join(name.split(".")[:2]) for name in names})


class AveragingAdamW(torch.optim.AdamW):
    """AdamW that keeps an exponential average of its parameters in its state, as `ema`.

    There DeepSpeed partitions, saves and restores it like the moments. It starts as the weights before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]], *, ema_decay: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of AdamW, then one of the average."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = {p: p.detach().clone() for p in parameters if EMA not in self.state[p]}
        loss = super().step(closure)
        for parameter in parameters:
            state = self.state[parameter]
            if parameter in before:
                state[EMA] = before[parameter]
            state[EMA].lerp_(parameter.detach(), 1 - self.ema_decay)
        return loss
