"""What a seed stands for."""

from __future__ import annotations

from tests.faults.mixtures import draw_mixture
from tests.faults.scenario import Scenario, draw_faults
from tests.faults.stragglers import draw_straggler


def draw(seed: int) -> Scenario:
    """The scenario of a seed: of sixteen one is of stragglers, and one of mixtures."""
    if seed % 16 == 15:
        return draw_straggler(seed)
    return draw_mixture(seed) if seed % 16 == 5 else draw_faults(seed)
