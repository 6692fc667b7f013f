"""Every mutant of the core is caught by some seed, and the core itself is not by the same seeds."""

from __future__ import annotations

import pytest

from tests.faults.mutants import MUTANTS
from tests.faults.replay import command
from tests.faults.simulator import simulate

MAX_SEEDS = 600


@pytest.mark.slow  # tests of the simulator's oracles, not of the client
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str) -> None:
    for seed in range(MAX_SEEDS):
        violation = simulate(seed, MUTANTS[name]).violation
        if violation is not None:
            print(f"{name}: caught by '{violation.oracle}' after {seed + 1} seeds ({command(seed, name)})")
            assert simulate(seed).violation is None, f"the core itself breaks a promise: {command(seed)}"
            return
    pytest.fail(f"{name} breaks no promise in {MAX_SEEDS} seeds: an oracle or a fault is missing")
