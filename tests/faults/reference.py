"""What the simulator holds the core against, written a second time and naively: streams, pieces, and the ways to be wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from stoker_proto.order.lanes import LaneRun, Order
from stoker_proto.order.mixture import MixedOrder, PassRange
from stoker_proto.wire.messages import Piece, Ticket
from stoker_proto.wire.row_bits import unpack_rows

LANES = 2
"""Lanes per entry."""
SHARDS = 4
"""Shards per entry."""
SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((3, 4),),
    ((5, 2),),
    ((2, 3), (4, 1)),
    ((6, 0), (1, 3)),
    ((4, 4), (2, 3)),
    ((1, 1), (5, 4)),
    ((20, 20), (20, 20), (20, 20), (20, 20)),
    ((2, 1), (1, 3), (3, 2)),
    ((1, 0), (4, 2), (2, 2)),
)
"""Lane lengths, entry by entry. Few and small, so that a schedule costs little and the caches below are shared by all."""
LONG_SHAPE = 6
"""Long enough to measure latencies in; for the schedules of stragglers."""
Row = tuple[int, int, int]
"""(pass, lane, position in the lane): one sample."""


class Mixture(NamedTuple):
    """How entries make up the stream of an epoch."""

    sources: tuple[int, ...]
    """Entry -> source."""
    weights: tuple[int, ...] = ()
    """Of the sources; none: an epoch is one pass over each."""

    @property
    def num_sources(self) -> int:
        return max(self.sources) + 1


class Violation(AssertionError):
    """The core broke a promise; `oracle` says which."""

    def __init__(self, oracle: str, text: str) -> None:
        super().__init__(f"{oracle}: {text}")
        self.oracle = oracle


def lanes_of(shape: int, number: int) -> tuple[tuple[int, ...], ...]:
    """Lane lengths of a pass, entry by entry; they differ between passes, the number of entries does not."""
    entries = len(SHAPES[shape])
    alike = [one for one in SHAPES if len(one) == entries]
    return alike[(alike.index(SHAPES[shape]) + number) % len(alike)]


def stream_of_pass(shape: int, cell: int, mixture: Mixture, source: int, number: int) -> list[Row]:
    """One pass over a source: every cell of its lanes with its due time, sorted (DECISIONS.md 3)."""
    cells = []
    for lane, length in enumerate(length for entry in lanes_of(shape, number) for length in entry):
        if mixture.sources[lane // LANES] != source:
            continue
        num_cells = -(-length // cell)
        for k in range(num_cells):
            due = (2 * k + 1) * 2**32 // (2 * num_cells)
            cells.append((due, lane, range(k * cell, min((k + 1) * cell, length))))
    return [
        (number, lane, position) for _, lane, positions in sorted(cells, key=lambda c: c[:2]) for position in positions
    ]


def rates_of(shape: int, mixture: Mixture) -> list[Fraction]:
    """Passes over each source in an epoch, to the nearest 2**-32; one pass over that which lasts longest."""
    if not mixture.weights:
        return [Fraction(1)] * mixture.num_sources
    needed = []
    for source, weight in enumerate(mixture.weights):
        lengths = [sum(lanes) for entry, lanes in enumerate(lanes_of(shape, 0)) if mixture.sources[entry] == source]
        needed.append(Fraction(weight, sum(lengths)))
    return [Fraction(round(need / min(needed) * 2**32), 2**32) for need in needed]


@functools.cache
def stream(shape: int, cell: int, mixture: Mixture, epoch: int) -> list[Row]:
    """The epoch's samples in order (DECISIONS.md 25 and 26).

    A source's passes follow one another, and sample i of n of pass p lies at p + (i + 1/2) / n: what lies between
    `epoch` and `epoch + 1` times the rate is this epoch's. Cells of all sources are sorted by where their middles are in it.
    """
    cells = []
    for source, rate in enumerate(rates_of(shape, mixture)):
        rows = []
        for number in range(math.ceil((epoch + 1) * rate)):
            one = stream_of_pass(shape, cell, mixture, source, number)
            for i, row in enumerate(one):
                if epoch * rate < number + Fraction(2 * i + 1, 2 * len(one)) <= (epoch + 1) * rate:
                    rows.append(row)
        for low in range(0, len(rows), cell):
            part = rows[low : low + cell]
            cells.append((Fraction(2 * low + len(part), 2 * len(rows)), source, part))
    return [row for _, _, part in sorted(cells, key=lambda c: c[:2]) for row in part]


def picture(row: Row) -> bytes:
    """What a piece carries for a sample: no two samples of any pass have the same."""
    return b"%d/%d/%d" % row


@functools.cache
def _content(number: int, lane: int, start: int, count: int) -> dict[str, object]:
    rows = [(number, lane, position) for position in range(start, start + count)]
    return {
        "keys": np.array([(lane // LANES, lane, position) for _, lane, position in rows], np.int64),
        "lengths": np.ones(count, np.int32),
        "input_ids": np.array([hash(row) % 1000 for row in rows], np.int32),
        "supervised": np.ones(count, np.uint8),
        "image_counts": np.ones(count, np.uint8),
        "images": [picture(row) for row in rows],
        "actions": np.zeros((count, 0, 0), np.float32),
    }


def make_piece(ticket: Ticket, loader: str, extra: int = 0) -> Piece:
    """The piece of a ticket, whoever makes it; extra: samples too many, as no honest loader sends."""
    content = _content(ticket.epoch, ticket.lane, ticket.start, ticket.count + extra)
    if ticket.rows and not extra:
        chosen = unpack_rows(ticket.rows, ticket.count).tolist()
        content = {name: [values[row] for row in chosen] for name, values in content.items()}  # type: ignore[index]
        content = {name: values if name == "images" else np.array(values) for name, values in content.items()}
    return Piece(ticket=ticket.ticket, loader=loader, **content)  # type: ignore[arg-type]


class RememberedOrder(MixedOrder):
    """The real order, whose answers are remembered: it is pure, and half a schedule's time would be spent in it."""

    def __init__(self, sources: Sequence[Sequence[PassRange]], lanes: Sequence[Sequence[int]], cell: int) -> None:
        super().__init__(sources, lanes, cell)
        self._known: dict[tuple[int, int], list[LaneRun]] = {}

    def runs(self, start: int, stop: int) -> list[LaneRun]:
        """As the real one."""
        known = self._known.get((start, stop))
        if known is None:
            known = self._known[start, stop] = super().runs(start, stop)
        return known


@functools.cache
def _order(lengths: tuple[int, ...], cell: int, starts: tuple[int, ...]) -> Order:
    return Order(lengths, cell, starts)


@functools.cache
def _mixed(
    sources: tuple[tuple[PassRange, ...], ...], lanes: tuple[tuple[int, ...], ...], cell: int
) -> RememberedOrder:
    return RememberedOrder(sources, lanes, cell)


def remembered_order(lengths: list[int], cell: int, starts: list[int]) -> Order:
    """In place of `Order`, while simulated: the same object for the same pass."""
    return _order(tuple(lengths), cell, tuple(starts))


def remembered_mixture(sources: list[list[PassRange]], lanes: list[list[int]], cell: int) -> MixedOrder:
    """In place of `MixedOrder`, while simulated; parts are the same where their orders are the same object."""
    return _mixed(tuple(map(tuple, sources)), tuple(map(tuple, lanes)), cell)
