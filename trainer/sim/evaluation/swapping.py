"""Does the outcome follow the instruction? Two tasks with the same scenes and different instructions, compared seed by seed.

    told                                    red on green  green on red  nothing
    stack the red cube on the green cube              88             2       10
    stack the green cube on the red cube               3            85       12

The outcome is taken at the last step, so each scene has exactly one. A policy that ignores the instruction can follow only one of
the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trainer.sim.evaluation.episode import EpisodeResult
from trainer.sim.evaluation.intervals import wilson
from trainer.sim.evaluation.summary import aligned, rate
from trainer.sim.tasks.registry import instruction_pairs, other_instruction

NOTHING = "nothing"


def with_swapped(tasks: Sequence[str]) -> list[str]:
    """The tasks, each followed by the one with the other instruction. Raises ConfigError for a task that has none."""
    return list(dict.fromkeys(each for task in tasks for each in (task, other_instruction(task))))


def swapped(results: Sequence[EpisodeResult], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """What was done under each of two instructions, for each pair among the tasks, over the seeds that both have finished.

    `followed`: both instructions were followed in the scene; `ignored`: the same was done under both. Rates are {value, low,
    high}, fractions with Wilson's 95% interval.
    """
    played = {(result.task, result.seed): result for result in results}
    rows = []
    for task, other in instruction_pairs(tasks):
        seeds = [seed for name, seed in played if name == task and (other, seed) in played]
        pairs = [(played[task, seed], played[other, seed]) for seed in seeds]
        if not pairs:
            continue
        followed = sum(first.success_at_end and second.success_at_end for first, second in pairs)
        ignored = sum(first.outcome == second.outcome != "" for first, second in pairs)
        rows.append(
            {
                "tasks": [task, other],
                "scenes": len(pairs),
                "outcomes": {
                    side[0].instruction: dict(Counter(result.outcome or NOTHING for result in side))
                    for side in zip(*pairs, strict=True)
                },
                "followed": asdict(wilson(followed, len(pairs))),
                "ignored": asdict(wilson(ignored, len(pairs))),
            }
        )
    return rows


def swap_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """`swapped` as text."""
    parts = []
    for row in rows:
        names = [*sorted({name for counts in row["outcomes"].values() for name in counts} - {NOTHING}), NOTHING]
        lines = [("told", *names)]
        lines += [(told, *(str(counts.get(name, 0)) for name in names)) for told, counts in row["outcomes"].items()]
        followed = f"both instructions followed {rate(row['followed'])}"
        parts.append(
            f"{aligned(lines)}\nof {row['scenes']} scenes: {followed}, the same done under both {rate(row['ignored'])}"
        )
    return "\n\n".join(parts)
