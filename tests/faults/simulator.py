"""A run of the real cores against simulated loaders, decided by one integer. `simulate(seed)` or `python -m tests.faults.replay`.

Oracles (the name that a `Violation` bears):
    order         every rank is given its slices in order; the lineage of checkpoints is the epochs' streams, in any sizes
    exactly once  every sample of every epoch is in the lineage once
    payload       a micro-batch holds the pieces of its own samples and nothing else
    tickets       a number means one thing for ever; the limit of tickets asked for holds; none is left at the end
    window        no more samples are asked for and not taken than the window has
    buffer        nor does the core hold more tickets and micro-batches than that: what waits for its turn is among them
    failure       the error of the data deadline comes when all who hold an entry are gone so long, and never else
    hedges        they stay within their budget, and who asks twice at once calls it a hedge
    cold start    no loader is hedged that answered nothing yet
    backoff       a loader that fails again and again is not the first to be asked, while another is there
    gap           with one straggler among the loaders the trainer never stands still for long
    pace          nor is the whole as slow as the straggler
    return        and when it is well again it is asked again
    counts        the core's counters are right, and nothing is open in its books at the end
    liveness      once all is healed, everything is trained within a bound of virtual time
    spin          the core never asks to be called again at once
    crash         the core raises nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from unittest import mock

from tests.faults.loaders import SimulatedLoader
from tests.faults.reference import Violation, remembered_mixture, remembered_order
from tests.faults.scenario import DATA_DEADLINE_S, TICK, Fault, Scenario
from tests.faults.seeds import draw
from tests.faults.stragglers import SLOW
from tests.faults.trainer import MakeCore, SimulatedTrainer
from tests.faults.world import World
from trainer.feed.client.core import Core

UNDER_WAY_S = 4.0
"""What was sent before all went dark may come so much later, and be the core's last sign of life."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run."""

    seed: int
    violation: Violation | None
    virtual_s: float
    num_events: int
    lives: int
    gave_up: bool
    """Ended once by the data deadline, as was due."""
    log: list[str]


class Simulation:
    """One run."""

    def __init__(self, scenario: Scenario, make_core: MakeCore, *, keep_log: bool) -> None:
        self.scenario = scenario
        self.world = World(scenario, keep_log=keep_log)
        self.loaders = [SimulatedLoader(self.world, number) for number in range(scenario.num_loaders)]
        self.trainer = SimulatedTrainer(self.world, self.loaders, make_core, self._restore)
        self.gave_up = False
        self._dark = False
        self._healed_at = scenario.heal_at
        self._bound_s = scenario.bound_s()
        world = self.world
        for loader, at in zip(self.loaders, scenario.joins_at, strict=True):
            world.after(at, loader.start)
        world.after(0.0, self.trainer.begin)
        for fault in scenario.faults:
            world.after(fault.at, self._befall, fault)
        for at, soft in scenario.crashes:
            world.after(at, self.trainer.crash, soft)
        world.after(scenario.heal_at, self._heal)
        if scenario.blackout_at is not None:
            world.after(scenario.blackout_at, self._go_dark)

    def run(self) -> None:
        """To the end. Raises Violation."""
        world, trainer = self.world, self.trainer
        while not trainer.finished:
            if self._dark:
                limit = max(trainer.last_progress, self.scenario.blackout_at or 0.0) + DATA_DEADLINE_S + UNDER_WAY_S
                oracle, text = "failure", "no loader holds the data any more, and no error came"
            else:
                limit = max(self._healed_at, trainer.began) + self._bound_s
                oracle, text = "liveness", f"not all is trained {self._bound_s:g} s after all was healed"
            if world.next_time() > limit:
                raise Violation(oracle, text)
            world.step()
            trainer.turn()

    # -- faults

    def _befall(self, fault: Fault) -> None:
        world, loader = self.world, self.loaders[fault.loader]
        if world.now >= self._healed_at or loader.gone or loader.barred:
            return
        if fault.kind == "kill":
            loader.kill("is killed")
            world.after(fault.for_s, loader.start)
        elif fault.kind == "leave":
            others = [other for other in self.loaders if other is not loader and not other.gone]
            held = {entry for other in others for entry in other.held}
            lacked = frozenset.intersection(*(other.lacks for other in others)) if others else frozenset({-1})
            if set(loader.held) <= held and not lacked:  # where shards are lacked, all hold all entries
                loader.kill("leaves for good")
                loader.gone = True
        elif fault.kind == "hang":
            loader.hang()
            world.after(fault.for_s, loader.wake, loader.incarnation)
        elif fault.kind == "stick":
            loader.stick()
            world.after(fault.for_s, loader.loosen, loader.incarnation)
        elif fault.kind in ("slow", "slowed"):
            world.say("%s is %d times slower", loader.name, SLOW)
            loader.slow = SLOW
            world.after(fault.for_s, setattr, loader, "slow", 1)
        elif fault.kind == "busy":
            world.say("%s serves others", loader.name)
            for n in range(round(4 * fault.for_s)):
                world.after(n / 4, loader.serve_others, 0.2)
        elif fault.kind == "cut":
            for link in loader.links:
                link.break_(world.rng.choice((TICK, 0.5, 1.5, None)))
                world.after(fault.for_s, link.connect_soon)
        elif fault.kind == "drain":
            loader.drain()
            world.after(0.5, self._drained, loader, loader.incarnation)
            world.after(0.5 + fault.for_s, loader.start)
        else:
            world.say("%s is full", loader.name)
            loader.full = True
            world.after(fault.for_s, setattr, loader, "full", False)

    def _drained(self, loader: SimulatedLoader, incarnation: int) -> None:
        if loader.draining and loader.incarnation == incarnation:
            loader.kill("has drained and ends")

    def _heal(self) -> None:
        """The network is good again; what is down comes up, and who was sent rubbish connects anew."""
        self.world.say("all heals")
        self.world.noise_until = self.world.now
        for loader in self.loaders:
            loader.wake(loader.incarnation)
            loader.full = False
            if loader.draining:
                loader.kill("has drained and ends")
            loader.start()
            for link in loader.links:
                if link.excluded:
                    link.break_(TICK)
                if not link.up:
                    link.connect_soon()

    def _go_dark(self) -> None:
        entry = self.scenario.blackout_entry
        if self.trainer.finished:
            return
        self._dark = True
        for loader in self.loaders:
            if entry is None or entry in loader.held:
                loader.kill("is gone")
                loader.barred = True

    def _restore(self) -> None:
        """The trainer has given up: loaders and trainer are started again."""
        self._dark, self.gave_up = False, True
        self._healed_at = self.world.now
        for loader in self.loaders:
            loader.barred = False
        self._heal()
        self.world.after(0.25, self.trainer.begin)


def simulate(seed: int, make_core: MakeCore = Core, *, keep_log: bool = False) -> Outcome:
    """Run the scenario of a seed; make_core: what stands in for the core, to see whether the oracles notice."""
    simulation = Simulation(draw(seed), make_core, keep_log=keep_log)
    world, violation = simulation.world, None
    with mock.patch.multiple("trainer.feed.client.epochs", Order=remembered_order, MixedOrder=remembered_mixture):
        try:
            simulation.run()
        except Violation as broken:
            violation = broken
        except Exception as error:  # noqa: BLE001  (whatever the core raises is a finding)
            violation = Violation("crash", f"{type(error).__name__}: {error}")
            violation.__cause__ = error
    return Outcome(
        seed=seed,
        violation=violation,
        virtual_s=world.now,
        num_events=world.num_events,
        lives=simulation.trainer.life + 1,
        gave_up=simulation.gave_up,
        log=world.log or [],
    )
