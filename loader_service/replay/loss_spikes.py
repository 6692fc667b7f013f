"""`--worst-loss`: the steps whose loss rose most, and their rows with the largest losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loader_service.replay.step import RunStep
from stoker_proto.errors import ConfigError
from stoker_proto.run_record import WorstStep, read_worst, worst_file

ROWS = 3
"""Rows that are named of each step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstRow:
    """Where a row stands in its step."""

    loss: float | None
    """Mean NLL per label; None: not finite."""
    rank: int
    micro_batch: int
    number: int


def worst_steps(output_dir: Path, count: int) -> Iterator[tuple[WorstStep, RunStep, list[WorstRow]]]:
    """The worst steps, the worst first, each with its rows of the largest loss. Raises ConfigError where a run kept none."""
    found = read_worst(output_dir, 0)
    if not found:
        raise ConfigError(
            f"{worst_file(output_dir, 0)} names no step: the loss never rose above that of the steps before, the run is too "
            "young, or trainer.worst_steps is 0"
        )
    for worst in found[:count]:
        step = RunStep.read(output_dir, worst.step)
        rows = [
            WorstRow(loss=loss, rank=rank, micro_batch=index, number=number)
            for rank in range(len(step.lines))
            for one in read_worst(output_dir, rank)
            if (one.step, one.record) == (worst.step, worst.record) == (one.step, step.lines[0].record)
            for index, losses in enumerate(one.rows)
            for number, loss in enumerate(losses)
        ]
        rows.sort(key=lambda row: (row.loss is not None, -(row.loss or 0.0), row.rank, row.micro_batch, row.number))
        yield worst, step, rows[:ROWS]
