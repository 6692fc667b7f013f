"""Are the seeds of an evaluation held out? Compared with those in the training data.

One line of a JSONL file of demonstrations, as the collector writes it:

    {"obs_path": "train/traj_000005/obs.npz", "task": "PickCube-v1", "instruction": "pick up ...", "actions": [...], "seed": 5}
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker_proto.errors import ConfigError
from trainer.sim.evaluation.episode import Job

_SHOWN = 5
"""Seeds that a message lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSeeds:
    """What the rows of the training data say."""

    seeds: frozenset[tuple[str | None, int]]
    """(task, seed); the task of a row without one is None, and stands for every task."""
    num_unknown: int
    """Rows without a seed."""


def read_seeds(files: Iterable[Path]) -> TrainingSeeds:
    """The seeds in JSONL files. Raises ConfigError for a file that cannot be read."""
    found, num_unknown = set(), 0
    for file in files:
        try:
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line) if line.strip() else None
                    if not isinstance(row, dict):
                        continue
                    seed, task = row.get("seed"), row.get("task")
                    if isinstance(seed, int) and not isinstance(seed, bool):
                        found.add((task if isinstance(task, str) else None, seed))
                    else:
                        num_unknown += 1
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{file}: its seeds cannot be read ({error}); name JSONL files of demonstrations"
            ) from error
    return TrainingSeeds(seeds=frozenset(found), num_unknown=num_unknown)


def check_held_out(training: TrainingSeeds, jobs: Sequence[Job]) -> str:
    """A note about rows whose seed is unknown, or "". Raises ConfigError for a seed that the training data have."""
    seen = sorted(
        {job.seed for job in jobs if (job.task, job.seed) in training.seeds or (None, job.seed) in training.seeds}
    )
    if seen:
        some = ", ".join(map(str, seen[:_SHOWN])) + (" ..." if len(seen) > _SHOWN else "")
        raise ConfigError(
            f"{len(seen)} seeds of the evaluation are in the training data ({some}), so the model has seen these episodes: begin "
            f"with another seed, such as {1 + max(seed for _, seed in training.seeds)}"
        )
    if not training.num_unknown:
        return ""
    return (
        f"{training.num_unknown} training rows have no seed: whether the evaluation's seeds are held out is not known"
    )


def jobs_of(tasks: Sequence[str], seed_start: int, episodes: int) -> list[Job]:
    """The episodes of an evaluation, task by task."""
    return [Job(task=task, seed=seed_start + number) for task in tasks for number in range(episodes)]
