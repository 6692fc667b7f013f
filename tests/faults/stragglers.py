"""Schedules of one fault each, in a network without noise: loaders that hang, stick, slow down, flap or have others to serve.

All loaders hold everything and work on one ticket at a time, so that a slow one has a queue. What the core must then keep is
said in numbers: how long the trainer may stand still, how long the rest may take, and that a loader that is well again works.
"""

from __future__ import annotations

import random

from tests.faults.reference import LONG_SHAPE, Mixture
from tests.faults.scenario import TICK, Fault, Scenario

STRAGGLERS = ("hang", "stick", "slow", "slowed", "flap", "busy")
"""`stick`: PINGs are answered, tickets are not. `slow`: ten times slower to the end; `slowed`: for a time. `busy`: most of its
time goes to others."""
SERVICE_S = TICK
SLOW = 10
GAP_S = {"hang": 1.25, "stick": 2.0, "slow": 0.65, "slowed": 0.65, "busy": 0.65, "flap": 1.25}
"""The trainer may stand still for so long. Without the probe, the measure, or the takeover it is longer: see the mutants."""
RETURN_S = 6.0
"""In the last so many seconds of a schedule a loader that was slow for a time must be asked for something: with two lanes per
entry any level below the first gives none, and there are five, of one second each where the hold was doubled once."""


def rest_s(scenario: Scenario, samples: int) -> float:
    """Virtual seconds that `samples` may take from the fault on, while one loader is slow: at the pace of another one alone."""
    return 1.2 + samples / 4 * (scenario.step_s + 6 * TICK)


def draw_straggler(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = random.Random(f"straggler {seed}")
    kind = STRAGGLERS[seed // 16 % len(STRAGGLERS)]
    num_loaders = rng.choice((2, 2, 3))
    is_early = kind == "hang" and rng.random() < 0.5  # before anything is known of the loaders
    at = rng.randint(8, 16) * TICK if is_early else rng.randint(48, 80) * TICK
    for_s = {"hang": 3.0, "stick": 3.0, "slow": 60.0, "slowed": 1.5, "flap": 0.25, "busy": 3.0}[kind]
    faults = [Fault(at, kind, 0, for_s)]
    if kind == "flap":
        faults = [Fault(at + n * 0.5, "kill", 0, for_s) for n in range(6)]
    return Scenario(
        seed=seed,
        straggler=kind,
        shape=LONG_SHAPE,
        cell=rng.choice((1, 2)),
        num_epochs=3 if kind == "slowed" else 1,
        worlds=((rng.choice(((1, 4), (1, 2), (2, 2)))),),
        window_beyond=rng.choice((2, 4)),
        max_tickets=512,
        step_s=rng.choice((4, 6)) * TICK if kind in ("slowed", "flap", "busy") else rng.choice((0, 4)) * TICK,
        checkpoint_every=1,
        held=(frozenset(range(4)),) * num_loaders,
        build_s=(SERVICE_S,) * num_loaders,
        joins_at=(0.0,) * num_loaders,
        drop=0.0,
        duplicate=0.0,
        delay=0.0,
        garble=0.0,
        heal_at=at + 3.5,
        faults=tuple(faults),
        crashes=(),
        blackout_at=None,
        blackout_entry=None,
        mixture=Mixture((0,) * 4),
        takeover_ratio=0.0 if kind in ("hang", "stick") and rng.random() < 0.5 else 3.0,
    )
