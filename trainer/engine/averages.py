"""The averages of the weights (`trainer.ema_decay`) out of DeepSpeed's files, without ranks.

DeepSpeed's own reader puts the partitions of all ranks together, but knows only the weights. So each file is changed while it is
read: where AdamW's state has an average, it replaces the weights.

    stage 1, 2   optimizer_state_dict: single_partition_of_fp32_groups [group], base_optimizer_state: state {group: {ema: ...}}
    stage 3      optimizer_state_dict: fp32_flat_groups [part],                 optimizer_state_dict: state {part: {ema: ...}}

`python -m trainer.engine.averages ARGUMENTS` is DeepSpeed's `ds_to_universal` with averages in the place of weights.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trainer.engine.optimizer import EMA

_PLACES = (
    ("single_partition_of_fp32_groups", "base_optimizer_state"),
    ("fp32_flat_groups", "optimizer_state_dict"),
)


@contextmanager
def readable_states(*, averages: bool) -> Iterator[None]:
    """Inside, `torch.load` gives files of optimizer states as DeepSpeed's own reader needs them. For one thread.

    averages: those of `trainer.ema_decay` in place of the weights.
    """
    real = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        content = with_stage(real(*arguments, **options))
        return with_averages(content) if averages else content

    torch.load = load
    try:
        yield
    finally:
        torch.load = real


def with_stage(content: Any) -> Any:
    """The content of one of DeepSpeed's files, with its stage: the optimizer of stage 1 in bf16 leaves it out, and the reader
    then takes the file for none of ZeRO."""
    states = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if isinstance(states, dict) and _PLACES[0][0] in states:
        states.setdefault("zero_stage", 1)
    return content


def with_averages(content: Any) -> Any:
    """The content of one of DeepSpeed's files, with averages for weights if it holds optimizer states."""
    states = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(states, dict):
        return content
    for weights_key, states_key in _PLACES:
        if weights_key in states:
            found = states[states_key]["state"]
            states[weights_key] = [
                _average_or(weights, found.get(number, {})) for number, weights in enumerate(states[weights_key])
            ]
    return content


def _average_or(weights: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
    """float32, as long as `weights`: a partition's average has padding at its end. Before the first step there is none."""
    average: torch.Tensor = state.get(EMA, weights)
    return average.flatten()[: weights.numel()]


if __name__ == "__main__":
    with readable_states(averages=True):
        runpy.run_module("deepspeed.checkpoint.ds_to_universal", run_name="__main__")
