"""The open epochs: which passes over which entries they consist of, and their streams once the lanes are known. Pure.

    open(3)  ->  wanted {(3, 0), (3, 1)}  --LANES of (pass 3, entries 0 and 1)-->  orders[3]

With weights, pass 0 of every entry is wanted first: the rates depend on how many samples a pass has.
"""

from __future__ import annotations

from stoker_proto.hashing import fingerprint
from stoker_proto.order.lanes import TIME_END, Order
from stoker_proto.order.mixture import ONE_PASS, MixedOrder, pass_shares
from stoker_proto.order.stream import Pass, RunSources
from stoker_proto.wire.messages import Lanes
from trainer.feed.client.commands import Opened
from trainer.feed.client.options import CoreOptions


class Epochs:
    """All open epochs. The fleet passes LANES in."""

    def __init__(self, options: CoreOptions) -> None:
        self.options = options
        self.orders: dict[int, MixedOrder] = {}
        self.wanted: frozenset[Pass] = frozenset()
        """Passes whose lanes the open epochs need."""
        self._open: set[int] = set()
        self._lengths: dict[Pass, list[int]] = {}
        self._starts: dict[Pass, list[int]] = {}
        self._tokens: dict[int, int] = {}  # entry -> tokens of its pass 0
        self._pass_orders: dict[tuple[int, int], Order] = {}  # (pass, source) -> its stream
        self._sources = RunSources(
            names=options.source_names,
            entries=options.entries,
            entry_sources=options.sources,
            weights=options.weights,
            weigh_by=options.weigh_by,
            lanes=options.order.lanes,
            cell=options.order.cell,
        )
        self._rates: list[int] | None = None
        if not options.weights:
            self._rates = [ONE_PASS] * len(options.source_names)

    def open(self, epoch: int) -> None:
        """Want the lanes of the epoch's passes."""
        if epoch not in self._open:
            self._open.add(epoch)
            self._renew()

    def close_except(self, epochs: set[int]) -> None:
        """Forget all other epochs."""
        self._open &= epochs
        self.orders = {epoch: order for epoch, order in self.orders.items() if epoch in epochs}
        self._renew()
        for known in (self._lengths, self._starts):
            for one in known.keys() - self.wanted:
                del known[one]
        numbers = {one.number for one in self.wanted}
        for old in [old for old in self._pass_orders if old[0] not in numbers]:
            del self._pass_orders[old]

    def take(self, message: Lanes) -> list[list[str]]:
        """Keep the lanes of wanted passes. Returns what does not fit, as rows [name, theirs, ours]."""
        rows = []
        for entry, lengths in sorted(message.lengths.items()):
            one = Pass(message.epoch, entry)
            starts = message.starts.get(entry, [])
            if (
                not 0 <= entry < len(self.options.entries)
                or len(lengths) != self.options.order.lanes
                or min(lengths) < 0
            ):
                rows.append([f"lanes of entry {entry}", str(len(lengths)), str(self.options.order.lanes)])
            elif len(starts) != len(lengths) or not 0 <= min(starts) <= max(starts) < TIME_END:
                rows.append([f"starts of entry {entry}", str(starts)[:80], f"{len(lengths)} of them"])
            elif self._lengths.get(one, lengths) != lengths:
                rows.append([f"samples of entry {entry}, epoch {one.number}", str(sum(lengths)), str(self.total(one))])
            elif self._starts.get(one, starts) != starts:
                rows.append([f"starts of entry {entry}, epoch {one.number}", "others", "those of the first loader"])
            elif one.number == 0 and self._tokens.get(entry, message.tokens.get(entry, 0)) != message.tokens.get(
                entry, 0
            ):
                rows.append([f"tokens of entry {entry}", str(message.tokens.get(entry, 0)), str(self._tokens[entry])])
            elif one in self.wanted:
                self._lengths[one], self._starts[one] = lengths, starts
                if one.number == 0:
                    self._tokens[entry] = message.tokens.get(entry, 0)
        return rows

    def complete(self) -> list[int]:
        """Open epochs of which all lanes became known now. Raises ConfigError for weights that cannot be met."""
        if self._rates is None and self._open and all(one in self._lengths for one in self.wanted):
            self._rates = self._find_rates()
            self._renew()
        if self._rates is None:
            return []
        done = [
            epoch
            for epoch in sorted(self._open - self.orders.keys())
            if all(one in self._lengths for one in self._made_of(epoch))
        ]
        for epoch in done:
            self.orders[epoch] = self._mix(epoch)
        return done

    def total(self, one: Pass) -> int:
        """Samples of a known pass over an entry."""
        return sum(self._lengths[one])

    def opened(self, epoch: int) -> Opened:
        """The command that tells the consumer of a complete epoch."""
        order = self.orders[epoch]
        whole = [
            self._order_of(pass_shares(rate, epoch)[0].number, source).total
            for source, rate in enumerate(self._rates or [])
        ]
        return Opened(epoch, order.total, tuple(order.counts), tuple(whole))

    def fingerprints(self) -> dict[str, str]:
        """`mixture`: of the rates, once they are known. Empty without weights, as an epoch is one pass then."""
        return {"mixture": fingerprint(self._rates)} if self.options.weights and self._rates is not None else {}

    def _renew(self) -> None:
        self.wanted = frozenset(one for epoch in self._open for one in self._made_of(epoch))

    def _made_of(self, epoch: int) -> list[Pass]:
        if self._rates is None:
            return [Pass(0, entry) for entry in range(len(self.options.entries))]
        return self._sources.passes(self._rates, epoch)

    def _find_rates(self) -> list[int]:
        samples = {entry: self.total(Pass(0, entry)) for entry in range(len(self.options.entries))}
        return self._sources.find_rates(samples, self._tokens)

    def _mix(self, epoch: int) -> MixedOrder:
        return self._sources.mix(self._rates or [], epoch, self._order_of)

    def _order_of(self, number: int, source: int) -> Order:
        """The stream of pass `number` over a source."""
        key, entries = (number, source), self._sources.entries_of(source)
        if key not in self._pass_orders:
            lengths = [length for entry in entries for length in self._lengths[Pass(number, entry)]]
            starts = [start for entry in entries for start in self._starts[Pass(number, entry)]]
            self._pass_orders[key] = Order(lengths, self.options.order.cell, starts)
        return self._pass_orders[key]
