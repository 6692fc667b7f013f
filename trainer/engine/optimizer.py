"""The learning rate as a pure function of the step, and the parameter groups with and without weight decay.

There is no scheduler object: nothing to save, and nothing that drifts after a step that was not applied or after a resume.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from stoker_proto.config import TrainerConfig


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


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: matrices decay, vectors (biases, norms) do not.

    Under ZeRO-3 a parameter is a placeholder of size 0 here; `ds_shape` holds its true shape.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups[0 if len(shape) >= 2 else 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]
