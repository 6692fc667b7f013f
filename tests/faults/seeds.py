"""What a seed stands for."""

from __future__ import annotations

from tests.faults.mixtures import draw_mixture
from tests.faults.parts import draw_parts
from tests.faults.scenario import Scenario, draw_faults
from tests.faults.stragglers import draw_straggler


def draw(seed: int) -> Scenario:
    """The scenario of a seed: of sixteen one is of stragglers, one of mixtures, and one of parts of entries."""
    if seed % 16 == 15:
        return draw_straggler(seed)
    if seed % 16 == 9:
        return draw_parts(seed)
    return draw_mixture(seed) if seed % 16 == 5 else draw_faults(seed)
