"""Schedules of many faults over loaders of which each lacks some shards of every entry."""

from __future__ import annotations

import dataclasses
import random

from tests.faults.reference import LANES, SHAPES, SHARDS
from tests.faults.scenario import Scenario, draw_faults


def draw_parts(seed: int) -> Scenario:
    """The scenario of a seed; one loader alone holds all."""
    rng, scenario = random.Random(f"parts {seed}"), draw_faults(seed)
    num = scenario.num_loaders
    held = [{shard for shard in range(SHARDS) if rng.random() < 0.4} for _ in range(num)]
    for shard in range(SHARDS):  # each is somewhere, of many only at one place
        if not any(shard in one for one in held):
            held[rng.randrange(num)].add(shard)
    for one in held:
        if not one:
            one.add(rng.randrange(SHARDS))
    return dataclasses.replace(
        scenario,
        held=(frozenset(range(len(SHAPES[scenario.shape]))),) * num,
        lacks=tuple(frozenset(range(SHARDS)) - one for one in held),
        blackout_entry=None,
    )


def shards_of(number: int, lane: int, start: int, count: int) -> list[int]:
    """Shard of each of these rows of a pass."""
    return [(5 * number + 3 * (lane % LANES) + (start + n) * (start + n + 1) // 2) % SHARDS for n in range(count)]


def missing_of(held: list[int], lacks: frozenset[int]) -> list[list[int | str]]:
    """`Welcome.missing`: a range for every shard, as ranges need not be as long as they could be."""
    return [[entry, n, n + 1, SHARDS, f"shard{n}", f"shard{n}"] for entry in held for n in sorted(lacks)]
