"""Who waits for whom: the trainer for data, or the loaders for the trainer; and the log line that says it.

data-bound       5% of the time or more went by waiting for data: the loaders must be faster, by how much is said
trainer-bound    less than that: faster loaders would gain at most the share that is said
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from stoker_proto.fleet.verdict import WAITS

_LINE_S = 30.0
"""Seconds between two log lines at least: short steps with `log_interval: 1` would fill the log."""


def verdict_of(wait_s: float, train_s: float) -> str:
    """In words, for `wait_s` of waiting within `train_s`.

    >>> verdict_of(3.0, 10.0)
    'data-bound: 30.0% of the time is waiting for data, so steps would be 1.43 times as fast with enough loaders'
    >>> verdict_of(0.1, 10.0)
    'trainer-bound: 1.0% of the time is waiting for data, and faster loaders would gain no more'
    """
    share = wait_s / train_s if train_s else 0.0
    said = f"{100 * share:.1f}% of the time is waiting for data"
    if share < WAITS:
        return f"trainer-bound: {said}, and faster loaders would gain no more"
    if share > 0.99:
        return f"data-bound: {said}: the loaders deliver nearly nothing"
    return f"data-bound: {said}, so steps would be {1 / (1 - share):.2f} times as fast with enough loaders"


class Interval:
    """Waiting and training time since the last log interval, and whether a line is due."""

    def __init__(self) -> None:
        self._wait_s = self._train_s = 0.0
        self._said_at: float | None = None

    def add(self, wait_s: float, step_s: float) -> None:
        """One more step. wait_s: of the rank that waited longest."""
        self._wait_s, self._train_s = self._wait_s + wait_s, self._train_s + step_s

    def end(self) -> tuple[float, str]:
        """(share of waiting, the verdict) of the interval that ends here."""
        found = self._wait_s / self._train_s if self._train_s else 0.0, verdict_of(self._wait_s, self._train_s)
        self._wait_s = self._train_s = 0.0
        return found

    def is_line_due(self, *, is_last: bool) -> bool:
        """Whether to log a line now."""
        now = time.monotonic()
        if not is_last and self._said_at is not None and now - self._said_at < _LINE_S:
            return False
        self._said_at = now
        return True


def line_of(figures: Mapping[str, float], verdict: str) -> str:
    """The log line of a step: loss, speed, memory, verdict."""
    memory = f", {figures['train/gpu_memory_gb']:.1f} GB of GPU memory" if "train/gpu_memory_gb" in figures else ""
    mfu = f", MFU {100 * figures['train/mfu']:.1f}%" if "train/mfu" in figures else ""
    return (
        f"loss {figures['train/loss']:.4f}, {figures['train/samples_per_s']:.1f} samples/s, "
        f"{figures['train/tokens_per_s']:.0f} tokens/s{mfu}{memory}; {verdict}"
    )


def peak_memory_gb(device: torch.device) -> float:
    """Most GPU memory in GB that PyTorch's tensors took on the device since the start; 0 without a GPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
