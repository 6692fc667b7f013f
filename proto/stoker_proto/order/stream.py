"""From the sources of a run and the lanes of their entries to the epoch's stream, and the part of one rank in it. Pure.

sources + samples of pass 0  -->  rates  -->  passes of an epoch  -->  MixedOrder  -->  positions of a rank's micro-batch
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stoker_proto.errors import ConfigError
from stoker_proto.order.lanes import Order
from stoker_proto.order.mixture import ONE_PASS, MixedOrder, PassRange, pass_shares, rates


class Pass(NamedTuple):
    """One pass over one entry. The loaders call it an epoch of the entry."""

    number: int
    entry: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSources:
    """The sources of a run, as its stream sees them."""

    names: tuple[str, ...]
    entries: tuple[str, ...]
    """Entry number -> its text in messages."""
    entry_sources: tuple[int, ...]
    """Entry number -> number of its source."""
    weights: tuple[float, ...]
    """Empty: an epoch is one pass over each source."""
    weigh_by: str
    """`samples` or `tokens`."""
    lanes: int
    """Of each entry."""
    cell: int

    def entries_of(self, source: int) -> list[int]:
        """Numbers of the entries of one source."""
        return [entry for entry, number in enumerate(self.entry_sources) if number == source]

    def find_rates(self, samples: Mapping[int, int], tokens: Mapping[int, int]) -> list[int]:
        """The passes per epoch of each source, in units of 2**-32.

        samples, tokens: of pass 0 of each entry; tokens 0: not counted. Raises ConfigError for weights that cannot be met.
        """
        if not self.weights:
            return [ONE_PASS] * len(self.names)
        totals = [sum(samples[entry] for entry in self.entries_of(source)) for source in range(len(self.names))]
        weights = list(self.weights)
        if self.weigh_by == "tokens":
            for source, name in enumerate(self.names):
                entries = self.entries_of(source)
                for entry in entries:
                    if not tokens[entry] and samples[entry]:
                        raise ConfigError(
                            f"data.weigh_by is tokens, but the loaders cannot say how many {self.entries[entry]} of source "
                            f"{name} has: its tokens are not counted, and none of its first records is "
                            "good enough to go by; mend the entry or leave it out, or set data.weigh_by to samples"
                        )
                of_source = sum(tokens[entry] for entry in entries)
                weights[source] *= totals[source] / max(of_source, 1)  # a share of tokens -> a share of samples
        return rates(self.names, totals, weights)

    def passes(self, found: Sequence[int], epoch: int) -> list[Pass]:
        """What an epoch consists of at the rates `found`."""
        return [
            Pass(share.number, entry)
            for source, rate in enumerate(found)
            for share in pass_shares(rate, epoch)
            for entry in self.entries_of(source)
        ]

    def mix(self, found: Sequence[int], epoch: int, order_of: Callable[[int, int], Order]) -> MixedOrder:
        """The stream of an epoch. order_of(pass, source): the order of one pass over the lanes of the source's entries."""
        sources: list[list[PassRange]] = []
        for source, rate in enumerate(found):
            parts = []
            for share in pass_shares(rate, epoch):
                order = order_of(share.number, source)
                parts.append(PassRange(share.number, order, *share.cut(order.total)))
            sources.append(parts)
        lanes = [
            [entry * self.lanes + lane for entry in self.entries_of(source) for lane in range(self.lanes)]
            for source in range(len(self.names))
        ]
        return MixedOrder(sources, lanes, self.cell)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How the rows of a step are divided among ranks and their micro-batches."""

    world_size: int
    micro_batch_size: int

    def positions(self, first: int, rank: int, index: int, total: int) -> tuple[int, int]:
        """Stream positions [start, stop) of micro-batch `index` of a rank, in the step that begins at `first`, of `total`.

        >>> share = Share(world_size=2, micro_batch_size=2)
        >>> share.positions(8, 0, 0, 11), share.positions(8, 1, 0, 11), share.positions(8, 0, 1, 11)
        ((8, 10), (10, 11), (11, 11))
        """
        start = min(first + (index * self.world_size + rank) * self.micro_batch_size, total)
        return start, min(start + self.micro_batch_size, total)
