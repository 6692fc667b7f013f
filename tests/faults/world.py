"""Virtual time: a heap of events, a network with dice, and a log of what happened."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

from tests.faults.scenario import TICK, Scenario


class World:
    """Time, chance and the log of one run."""

    def __init__(self, scenario: Scenario, *, keep_log: bool) -> None:
        self.scenario = scenario
        self.now = 0.0
        self.rng = random.Random(scenario.seed)
        self.log: list[str] | None = [] if keep_log else None
        self.noise_until = scenario.heal_at
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def say(self, text: str, *values: object) -> None:
        """A line of the log, if one is kept."""
        if self.log is not None:
            self.log.append(f"{self.now:8.3f}  {text % values}")

    def after(self, delay: float, call: Callable[..., None], *values: Any) -> None:
        """Call this so much later; what is due at the same time comes in the order in which it was asked for."""
        self.num_events += 1
        heapq.heappush(self._heap, (self.now + delay, self.num_events, call, values))

    def next_time(self) -> float:
        """When something is next due."""
        return self._heap[0][0] if self._heap else float("inf")

    def step(self) -> None:
        """Go to the next time at which something is due, and do all that is due then."""
        heap = self._heap
        self.now = heap[0][0]
        while heap and heap[0][0] == self.now:
            _, _, call, values = heapq.heappop(heap)
            call(*values)

    @property
    def noisy(self) -> bool:
        """Whether messages can be lost now."""
        return self.now < self.noise_until

    def carry(self, arrive: Callable[..., None], *values: Any) -> None:
        """A message on its way: perhaps lost, doubled, late; never in any certain order."""
        rng, scenario = self.rng, self.scenario
        dice, copies = rng.random(), 1
        if self.noisy:
            if dice < scenario.drop:
                self.say("  lost on the way: %s", values)
                return
            copies = 2 if dice > 1 - scenario.duplicate else 1
        for _ in range(copies):
            ticks = 1 + int(dice * 3e5) % 3
            if self.noisy and rng.random() < scenario.delay:
                ticks = rng.randrange(4, 200)
            self.after(ticks * TICK, arrive, *values)
