"""What one seed means: data, fleet, trainer, network and the faults that befall them, all drawn before anything runs.

Times are virtual seconds on a grid of 1/64, so that they are exact and coincide often. The ratios of the core's times are
those of the default config: a ticket's deadline 1, the data deadline 12.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from dataclasses import dataclass

from stoker_proto.config import FeedConfig, OrderConfig
from tests.faults.reference import LANES, LONG_SHAPE, SHAPES, Mixture, Row, lanes_of, rates_of, stream
from trainer.feed.client.options import CoreOptions

TICK = 1 / 64
TICKET_DEADLINE_S, DATA_DEADLINE_S = 1.0, 12.0
LONGEST_FAULTS_S = 7.0
"""The network heals by then. With what the core may need to notice it, less than the data deadline."""
GLOBAL_BATCH = 4
WORLDS = ((1, 4), (1, 2), (1, 1), (2, 2), (2, 1), (4, 1))
"""(world size, micro-batch size) of the same global batch."""


@dataclass(frozen=True, slots=True)
class Fault:
    """At a time something happens to a loader; it ends by itself, at the latest when all heals."""

    at: float
    kind: str
    """`kill` (and restart as a new incarnation), `leave` (for good), `hang`, `cut` (connections), `drain`, `full`, or one of
    `stragglers.STRAGGLERS`."""
    loader: int
    for_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that is decided by the seed, but for the network's dice."""

    seed: int
    shape: int
    cell: int
    num_epochs: int
    worlds: tuple[tuple[int, int], ...]
    """One per life of the trainer; the last is kept for all further lives."""
    window_beyond: int
    """Micro-batches of the window beyond a step's own and one."""
    max_tickets: int
    step_s: float
    checkpoint_every: int
    held: tuple[frozenset[int], ...]
    """loader -> entries."""
    lacks: tuple[frozenset[int], ...] = ()
    """loader -> shards of each of these that it does not hold; none: entries are held whole."""
    build_s: tuple[float, ...]
    """loader -> time to make a piece."""
    joins_at: tuple[float, ...]
    drop: float
    duplicate: float
    delay: float
    garble: float
    """Of messages from a loader: a frame that is no message, or a piece of the wrong size."""
    heal_at: float
    faults: tuple[Fault, ...]
    crashes: tuple[tuple[float, bool], ...]
    """When the trainer crashes, and whether it is a soft one: the same processes begin anew from the cursor."""
    blackout_at: float | None
    blackout_entry: int | None
    """All who hold it are gone at that time, until the trainer gives up; None: all loaders."""
    straggler: str = ""
    """One of `stragglers.STRAGGLERS`, or none: then loaders work on all tickets at once."""
    takeover_ratio: float = 3.0
    """0: switched off by the user."""
    mixture: Mixture

    @property
    def num_loaders(self) -> int:
        """Loaders in the config."""
        return len(self.held)

    @property
    def entries(self) -> int:
        """Entries of the data paths."""
        return len(SHAPES[self.shape])

    def stream(self, epoch: int) -> list[Row]:
        """What an epoch trains, in order."""
        return stream(self.shape, self.cell, self.mixture, epoch)

    def bound_s(self) -> float:
        """Virtual seconds in which everything must be there, once nothing is broken any more."""
        steps = sum(-(-len(self.stream(epoch)) // GLOBAL_BATCH) + 1 for epoch in range(self.num_epochs))
        rounds = 2 if self.max_tickets < GLOBAL_BATCH else 1  # a step's tickets are asked for in two parts, or at once
        rounds *= 2 if self.lacks else 1  # where the rows are, and then the rows
        return 4 * TICKET_DEADLINE_S + steps * (self.step_s + rounds * (max(self.build_s) + 0.5))

    def options(self, life: int, rank: int) -> CoreOptions:
        """Of one rank in one life of the trainer."""
        world_size, micro_batch_size = self.worlds[min(life, len(self.worlds) - 1)]
        passes = GLOBAL_BATCH // (world_size * micro_batch_size)
        return CoreOptions(
            split="train",
            entries=tuple(f"entry{n}" for n in range(self.entries)),
            sources=self.mixture.sources,
            source_names=tuple(f"source{n}" for n in range(self.mixture.num_sources)),
            weights=self.mixture.weights,
            weigh_by="samples",
            addresses=tuple(f"tcp://loader{n}" for n in range(self.num_loaders)),
            rank=rank,
            world_size=world_size,
            client=f"rank{rank}.{life}",
            order=OrderConfig(lanes=LANES, cell=self.cell),
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch_size,
            window=passes + 1 + self.window_beyond,
            max_tickets=self.max_tickets,
            max_deaths=5,  # half the default, for runs that are shorter too: no more than four faults befall a loader
            feed=FeedConfig(
                ticket_deadline_s=4 * TICKET_DEADLINE_S if self.straggler else TICKET_DEADLINE_S,
                data_deadline_s=DATA_DEADLINE_S,
                connect_deadline_s=DATA_DEADLINE_S,
                takeover_ratio=self.takeover_ratio,
                backoff_s=2.0,
            ),
            hello_retry_s=0.5,
            ping_interval_s=1.0,
            silence_s=2.5,
            probe_s=0.25,
            shortest_deadline_s=0.25,
            shortest_hedge_s=0.125,
            look_s=0.125 if self.straggler else 0.5,
            hold_s=0.5,
            first_backoff_s=0.25,
            steady_s=3.0,
        )

    def describe(self) -> str:
        """A line for each value, for the log."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["rates"] = [float(rate) for rate in rates_of(self.shape, self.mixture)]
        values["lanes of the first passes"] = [lanes_of(self.shape, number) for number in range(self.num_epochs)]
        return "\n".join(f"  {name} = {value}" for name, value in values.items())


def draw_faults(seed: int) -> Scenario:
    """A scenario of many faults."""
    rng = random.Random(f"scenario {seed}")

    def time(low: float, high: float) -> float:
        return rng.randint(round(low / TICK), round(high / TICK)) * TICK

    shape = rng.randrange(LONG_SHAPE)
    num_entries = len(SHAPES[shape])
    num_loaders = rng.choice((1, 2, 2, 3))
    held = draw_held(rng, num_loaders, num_entries)
    heal_at = time(0.5, LONGEST_FAULTS_S if rng.random() < 0.3 else 3.0)
    noisy = rng.random() < 0.6
    blackout = rng.random() < 0.08
    faults = [_draw_fault(rng, time, num_loaders, heal_at) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    if rng.random() < 0.1:
        at = time(0, heal_at / 2)
        faults += [Fault(at, "kill", loader, time(0.5, heal_at)) for loader in range(num_loaders)]
    crashes = [(time(0.1, heal_at + 0.5), rng.random() < 0.4) for _ in range(rng.choice((0, 0, 1, 1, 2)))]
    return Scenario(
        seed=seed,
        shape=shape,
        cell=rng.choice((1, 2, 3)),
        num_epochs=rng.choice((1, 1, 1, 2)),
        worlds=tuple(rng.choices(WORLDS, weights=(5, 5, 2, 2, 2, 1), k=3)),
        window_beyond=rng.choice((0, 0, 1, 2, 4)),
        max_tickets=rng.choice((512, 512, 6, 3)),
        step_s=rng.choice((0.0, 0.0, 0.25, 0.5)),
        checkpoint_every=rng.choice((1, 1, 2)),
        held=held,
        build_s=tuple(rng.choice((TICK, 2 * TICK, 8 * TICK, 1.5)) for _ in range(num_loaders)),
        joins_at=(0.0, *(rng.choice((0.0, 0.0, time(0, 1.0))) for _ in range(num_loaders - 1))),
        drop=rng.choice((0.05, 0.15, 0.3)) if noisy else 0.0,
        duplicate=rng.choice((0.0, 0.1, 0.3)) if noisy else 0.0,
        delay=rng.choice((0.0, 0.1, 0.3)) if noisy else 0.0,
        garble=rng.choice((0.0, 0.0, 0.05)) if noisy else 0.0,
        heal_at=heal_at,
        faults=tuple(sorted(faults, key=lambda fault: fault.at)),
        crashes=tuple(sorted(crashes)),
        blackout_at=time(0, 1.0) if blackout else None,
        blackout_entry=rng.randrange(num_entries) if blackout and rng.random() < 0.5 else None,
        mixture=Mixture((0,) * num_entries),
    )


def draw_held(rng: random.Random, num_loaders: int, num_entries: int) -> tuple[frozenset[int], ...]:
    """Everything everywhere, or parts; each entry somewhere."""
    everything = frozenset(range(num_entries))
    if num_entries == 1 or num_loaders == 1 or rng.random() < 0.5:
        return (everything,) * num_loaders
    held = [frozenset({rng.randrange(num_entries)}) for _ in range(num_loaders)]
    missing = everything.difference(*held)
    held[rng.randrange(num_loaders)] |= missing
    return tuple(held)


def _draw_fault(rng: random.Random, time: Callable[[float, float], float], num_loaders: int, heal_at: float) -> Fault:
    kind = rng.choice(("kill", "kill", "hang", "hang", "cut", "drain", "leave", "full"))
    return Fault(time(0, min(heal_at, 2.0)), kind, rng.randrange(num_loaders), time(0.25, heal_at))
