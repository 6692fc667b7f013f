"""Schedules of many faults over entries of several sources: epochs that take other passes of each, and parts of them."""

from __future__ import annotations

import dataclasses
import random

from tests.faults.reference import SHAPES, Mixture
from tests.faults.scenario import Scenario, draw_faults, draw_held

_SOURCES = {2: ((0, 1),), 3: ((0, 1, 0), (0, 1, 2))}
"""Number of entries -> the sources that they can belong to."""
_WEIGHTS = {2: ((), (2, 1), (1, 3)), 3: ((), (2, 2, 3))}
"""Number of sources -> their weights. With the lengths of the shapes most rates are no whole numbers. Few, as the shapes are."""


def draw_mixture(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng, scenario = random.Random(f"mixture {seed}"), draw_faults(seed)
    shape = rng.choice([number for number, entries in enumerate(SHAPES) if len(entries) in _SOURCES])
    entries = len(SHAPES[shape])
    sources = rng.choice(_SOURCES[entries])
    return dataclasses.replace(
        scenario,
        shape=shape,
        num_epochs=rng.choice((1, 2, 2)),
        held=draw_held(rng, scenario.num_loaders, entries),
        blackout_entry=None if scenario.blackout_entry is None else rng.randrange(entries),
        mixture=Mixture(sources, rng.choice(_WEIGHTS[max(sources) + 1])),
    )
