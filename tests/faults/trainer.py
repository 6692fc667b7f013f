"""The simulated trainer: ranks that step together, checkpoints, crashes, and lives that go on from the cursor."""

from __future__ import annotations

from collections.abc import Callable

from stoker_proto.errors import DeadlineError, StokerError
from tests.faults.loaders import SimulatedLoader
from tests.faults.ranks import SimulatedRank
from tests.faults.reference import Row, Violation
from tests.faults.scenario import DATA_DEADLINE_S, GLOBAL_BATCH
from tests.faults.stragglers import GAP_S, RETURN_S, rest_s
from tests.faults.world import World
from trainer.feed.client.core import Core
from trainer.feed.client.options import CoreOptions

MakeCore = Callable[[CoreOptions, float], Core]


class SimulatedTrainer:
    """All ranks, and what they trained in the lineage of checkpoints."""

    def __init__(
        self, world: World, loaders: list[SimulatedLoader], make_core: MakeCore, given_up: Callable[[], None]
    ) -> None:
        """given_up: told when the trainer has ended with the error that was due."""
        self.world, self.loaders, self.make_core, self._given_up = world, loaders, make_core, given_up
        self.life = -1
        self.began = 0.0
        """This life, or its last new beginning."""
        self.ranks: list[SimulatedRank] = []
        self.touched: list[SimulatedRank] = []
        self.trained: list[Row] = []
        self.finished = False
        self.last_progress = 0.0
        self._epoch = self._first = self._num_steps = 0
        self._checkpoint = (0, 0, 0)  # epoch, sample, length of `trained`
        self._training = 0  # 0, or a number that tells this step from those of before a crash
        self._num_begun = 0
        self._last_step = 0.0
        self._left_at_fault: int | None = None  # samples

    # -- lives

    def begin(self) -> None:
        """A new life from the last checkpoint, perhaps of another size."""
        world = self.world
        self.life += 1
        self._resume()
        world_size, micro_batch_size = world.scenario.worlds[min(self.life, len(world.scenario.worlds) - 1)]
        world.say(
            "trainer begins: epoch %d sample %d, %d ranks of %d",
            *(self._epoch, self._first, world_size, micro_batch_size),
        )
        self.ranks = [SimulatedRank(self, number) for number in range(world_size)]
        for rank in self.ranks:
            for link in rank.links:
                link.connect_soon()
            rank.begin(self._epoch, self._first)

    def crash(self, soft: bool) -> None:
        """Lose all but the checkpoint; soft: the same processes go on from there."""
        if self.finished or not self.ranks:
            return
        self.world.say("trainer %s", "goes back to its checkpoint" if soft else "crashes")
        if soft:
            self._resume()
            for rank in self.ranks:
                rank.begin(self._epoch, self._first)
        else:
            self._end()
            self.world.after(self.world.rng.choice((0.125, 0.5)), self.begin)

    def _end(self) -> None:
        for rank in self.ranks:
            rank.dead = True
        self.ranks, self._training = [], 0
        for loader in self.loaders:
            loader.links.clear()

    def _resume(self) -> None:
        self._epoch, self._first, length = self._checkpoint
        del self.trained[length:]
        self._training = 0
        self.began = self.last_progress = self.world.now

    # -- steps

    def turn(self) -> None:
        """Let the cores that were told something act."""
        turns = 0
        while self.touched and not self.finished:
            self.touched.pop(0).turn()
            turns += 1
            if turns > 500:
                raise Violation("spin", "the cores do not come to rest")

    def progress(self) -> None:
        """Take what is there; train the step when all ranks have their part."""
        self.last_progress = self.world.now
        if self._training or not self.ranks:
            return
        options = self.ranks[0].options
        passes = GLOBAL_BATCH // (options.world_size * options.micro_batch_size)
        complete = True
        for rank in self.ranks:
            while rank.ready and len(rank.rows) < passes:
                rank.take()
            complete = complete and len(rank.rows) == passes
        if complete:
            self._num_begun += 1
            self._training = self._num_begun
            self.world.after(self.world.scenario.step_s, self._step, self._training)

    def _step(self, number: int) -> None:
        if number != self._training:
            return
        scenario = self.world.scenario
        for parts in zip(*(rank.rows for rank in self.ranks), strict=True):
            for rows in parts:
                self.trained.extend(rows)
        for rank in self.ranks:
            rank.rows.clear()
        self._training = 0
        self._check_pace()
        self._num_steps += 1
        self._first += GLOBAL_BATCH
        if self._first >= len(scenario.stream(self._epoch)):
            self._epoch, self._first = self._epoch + 1, 0
        if self._num_steps % scenario.checkpoint_every == 0:
            self._checkpoint = (self._epoch, self._first, len(self.trained))
            self.world.say("checkpoint at epoch %d sample %d", self._epoch, self._first)
        if self._epoch == scenario.num_epochs:
            self._finish()
        else:
            self.progress()

    def _check_pace(self) -> None:
        """With one straggler: how long the trainer stood still, and how long the rest took."""
        scenario, now = self.world.scenario, self.world.now
        last_step, self._last_step = self._last_step, now
        if not scenario.straggler or now < scenario.faults[0].at:
            return
        gap = now - max(last_step, scenario.faults[0].at)  # what was slow before, the start, was not the straggler
        if gap > GAP_S[scenario.straggler]:
            raise Violation("gap", f"the trainer stood still for {gap:g} s, at most {GAP_S[scenario.straggler]:g}")
        if self._left_at_fault is None:
            rows = sum(len(scenario.stream(epoch)) for epoch in range(scenario.num_epochs))
            self._left_at_fault = rows - len(self.trained)

    def _check_straggler(self) -> None:
        """At the end."""
        scenario, now = self.world.scenario, self.world.now
        took = now - scenario.faults[0].at
        allowed = rest_s(scenario, self._left_at_fault or 0)
        if scenario.straggler in ("slow", "slowed", "busy") and took > allowed:
            raise Violation("pace", f"{self._left_at_fault} samples took {took:g} s, at most {allowed:g}")
        if scenario.straggler == "slowed":
            last = max(rank.asks.first_asked_at[0] for rank in self.ranks)
            if last < now - RETURN_S:
                raise Violation("return", f"loader 0 is well again, and was last asked {now - last:g} s ago")

    def _finish(self) -> None:
        scenario = self.world.scenario
        self.finished = True
        expected = [row for epoch in range(scenario.num_epochs) for row in scenario.stream(epoch)]
        if sorted(self.trained) != sorted(expected):
            raise Violation("exactly once", f"trained {self.trained}, the epochs hold {expected}")
        if self.trained != expected:
            raise Violation("order", f"trained {self.trained}, the order is {expected}")
        for rank in self.ranks:
            rank.asks.ended()
            if rank.core.tickets.num_tickets or rank.core.tickets.batches:
                raise Violation(
                    "tickets", f"{rank.name} still holds {rank.core.tickets.num_tickets} tickets at the end"
                )
        if scenario.straggler:
            self._check_straggler()
        self.world.say("all is trained")

    # -- the end that is due when the data is gone

    def failed(self, rank: SimulatedRank, error: StokerError) -> None:
        """A rank's core gave up: right only in a blackout, only after the deadline, and only in the documented words."""
        now, blackout_at = self.world.now, self.world.scenario.blackout_at
        self.world.say("%s gives up: %s", rank.name, error)
        waited = now - rank.last_delivery
        if blackout_at is None or now < blackout_at + DATA_DEADLINE_S / 2 or waited < DATA_DEADLINE_S:
            raise Violation("failure", f"{rank.name} gave up {waited:g} s after its last delivery: {error}")
        text = str(error)
        said = "no data for 12 s" in text or "no loaders that together hold all the data" in text
        if not isinstance(error, DeadlineError) or not said or any(a not in text for a in rank.options.addresses):
            raise Violation("failure", f"{rank.name} gave up with {error!r}")
        self._end()
        self._given_up()
