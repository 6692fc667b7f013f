"""Tables of what came of the episodes: per task, per instruction, and of two models on the same seeds."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from trainer.sim.evaluation.episode import EpisodeResult
from trainer.sim.evaluation.intervals import Interval, Pairs, paired_difference, wilson

MAX_INSTRUCTIONS_SHOWN = 12
"""A task with more instructions (PickCube names the goal of each episode) is one line of the printed table."""


def summarise(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Figures of some episodes, at least one; rates are {value, low, high}, fractions with their Wilson 95% interval."""
    number = len(results)
    to_success = [result.steps_to_success for result in results if result.steps_to_success is not None]
    return {
        "episodes": number,
        "success_once": asdict(wilson(sum(result.success_once for result in results), number)),
        "success_at_end": asdict(wilson(sum(result.success_at_end for result in results), number)),
        "steps_to_success": float(np.mean(to_success)) if to_success else None,
        "reward": float(np.mean([result.reward for result in results])),
        "outside_mass": float(np.mean([result.outside_mass for result in results])),
    }


def by_task(results: Sequence[EpisodeResult]) -> dict[str, Any]:
    """Task -> its figures, with those of each of its instructions under `instructions`."""
    return {
        task: {
            **summarise(of_task),
            "instructions": {text: summarise(of_text) for text, of_text in _grouped(of_task, "instruction").items()},
        }
        for task, of_task in _grouped(results, "task").items()
    }


def compare(first: Sequence[EpisodeResult], second: Sequence[EpisodeResult]) -> list[dict[str, Any]]:
    """Per task, over the seeds that both have finished: outcomes, and the difference first - second with its interval."""
    others = {(result.task, result.seed): result for result in second}
    pairs = [(result, others[key]) for result in first if (key := (result.task, result.seed)) in others]
    rows = []
    for task in dict.fromkeys(one.task for one, _ in pairs):
        of_task = [pair for pair in pairs if pair[0].task == task]
        for name in ("success_once", "success_at_end"):
            counted = Pairs.of([(getattr(one, name), getattr(other, name)) for one, other in of_task])
            rows.append(
                {"task": task, "success": name, **asdict(counted), "difference": asdict(paired_difference(counted))}
            )
    return rows


def table(figures: Mapping[str, Any]) -> str:
    """`by_task` as text; an instruction has a line of its own where its task has several, and not too many."""
    lines: list[tuple[str, ...]] = [("", "episodes", "success once", "at the end", "steps", "reward", "outside")]
    for task, of_task in figures.items():
        lines.append(_line(task, of_task))
        texts = of_task["instructions"]
        if 1 < len(texts) <= MAX_INSTRUCTIONS_SHOWN:
            lines += [_line(f"  {text}", of_text) for text, of_text in texts.items()]
    return aligned(lines)


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`compare` as text; differences in points of percent."""
    lines: list[tuple[str, ...]] = [
        ("", "success", "seeds", "both", "only first", "only second", "neither", "difference, points")
    ]
    for row in rows:
        counts = [row[name] for name in ("both", "only_first", "only_second", "neither")]
        difference = Interval(**row["difference"])
        text = f"{100 * difference.value:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
        kind = "once" if row["success"] == "success_once" else "at the end"
        lines.append((row["task"], kind, *map(str, (sum(counts), *counts)), text))
    return aligned(lines)


def _line(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    steps = figures["steps_to_success"]
    return (
        name,
        str(figures["episodes"]),
        rate(figures["success_once"]),
        rate(figures["success_at_end"]),
        "-" if steps is None else f"{steps:.1f}",
        f"{figures['reward']:.3f}",
        f"{100 * figures['outside_mass']:.1f}%",
    )


def rate(figures: Mapping[str, float]) -> str:
    """{value, low, high} as percent: "90.0% [82.0, 95.0]"."""
    return f"{100 * figures['value']:.1f}% [{100 * figures['low']:.1f}, {100 * figures['high']:.1f}]"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text: the first column to the left, the others to the right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _grouped(results: Iterable[EpisodeResult], name: str) -> dict[str, list[EpisodeResult]]:
    groups: defaultdict[str, list[EpisodeResult]] = defaultdict(list)
    for result in results:
        groups[getattr(result, name)].append(result)
    return dict(groups)
