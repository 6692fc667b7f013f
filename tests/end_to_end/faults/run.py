"""A paced run: every step takes a little, as training does, and at given steps something happens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.end_to_end.fleet import Pulled, pull

STEP_S = 0.015
PATIENCE = (
    "trainer.feed.prefetch=2",  # a fault must meet a run that is at it, not one that has all it needs
    "trainer.feed.ticket_deadline_s=0.5",
    "trainer.feed.data_deadline_s=30",
)


def paced(
    config: Path,
    addresses: Sequence[str],
    events: Mapping[int, Callable[[], object]],
    *overrides: str,
    ranks: int = 1,
    step_s: float = STEP_S,
) -> Pulled:
    """Pull an epoch; `events` are called after the steps that they are listed under, on rank 0's thread."""
    happened: list[int] = []

    def on_step(step: int) -> None:
        time.sleep(step_s)
        if step in events:
            events[step]()
            happened.append(step)

    pulled = pull(config, addresses, *PATIENCE, *overrides, ranks=ranks, on_step=on_step)
    assert happened == sorted(events), "the run was over before all of it had happened"
    return pulled
