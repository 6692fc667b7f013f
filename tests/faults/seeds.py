"""What a seed stands for."""

from __future__ import annotations

from tests.faults.scenario import Scenario, draw_faults
from tests.faults.stragglers import draw_straggler


def draw(seed: int) -> Scenario:
    """The scenario of a seed: every sixteenth is one of stragglers."""
    return draw_straggler(seed) if seed % 16 == 15 else draw_faults(seed)
