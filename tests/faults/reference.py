"""What the simulator holds the core against, written a second time and naively: streams, pieces, and the ways to be wrong."""

from __future__ import annotations

import functools

import numpy as np

from stoker_proto.messages import Piece, Ticket
from stoker_proto.order import Order, Run

LANES = 2
"""Lanes per entry."""
SHAPES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((3, 4),),
    ((5, 2),),
    ((2, 3), (4, 1)),
    ((6, 0), (1, 3)),
    ((4, 4), (2, 3)),
    ((1, 1), (5, 4)),
    ((20, 20), (20, 20), (20, 20), (20, 20)),
)
"""Lane lengths, entry by entry. Few and small, so that a schedule costs little and the caches below are shared by all."""
LONG_SHAPE = len(SHAPES) - 1
"""Long enough to measure latencies in; for the schedules of stragglers."""
Row = tuple[int, int, int]
"""(epoch, lane, position in the lane): one sample."""


class Violation(AssertionError):
    """The core broke a promise; `oracle` says which."""

    def __init__(self, oracle: str, text: str) -> None:
        super().__init__(f"{oracle}: {text}")
        self.oracle = oracle


def lanes_of(shape: int, epoch: int) -> tuple[tuple[int, ...], ...]:
    """Lane lengths of an epoch, entry by entry; they differ between epochs, the number of entries does not."""
    entries = len(SHAPES[shape])
    alike = [one for one in SHAPES if len(one) == entries]
    return alike[(alike.index(SHAPES[shape]) + epoch) % len(alike)]


@functools.cache
def stream(shape: int, cell: int, epoch: int) -> list[Row]:
    """The epoch's samples in order: every cell with its due time, sorted (DECISIONS.md 3)."""
    cells = []
    for lane, length in enumerate(length for entry in lanes_of(shape, epoch) for length in entry):
        num_cells = -(-length // cell)
        for k in range(num_cells):
            due = (2 * k + 1) * 2**32 // (2 * num_cells)
            cells.append((due, lane, range(k * cell, min((k + 1) * cell, length))))
    return [
        (epoch, lane, position) for _, lane, positions in sorted(cells, key=lambda c: c[:2]) for position in positions
    ]


def picture(row: Row) -> bytes:
    """What a piece carries for a sample: no two samples of any epoch have the same."""
    return b"%d/%d/%d" % row


@functools.cache
def _content(epoch: int, lane: int, start: int, count: int) -> dict[str, object]:
    rows = [(epoch, lane, position) for position in range(start, start + count)]
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
    return Piece(ticket=ticket.ticket, loader=loader, **content)  # type: ignore[arg-type]


class RememberedOrder(Order):
    """The real order, whose answers are remembered: it is pure, and half a schedule's time would be spent in it."""

    def __init__(self, lengths: tuple[int, ...], cell: int, starts: tuple[int, ...]) -> None:
        super().__init__(lengths, cell, starts)
        self._known: dict[tuple[int, int], list[Run]] = {}

    def runs(self, start: int, stop: int) -> list[Run]:
        """As the real one."""
        known = self._known.get((start, stop))
        if known is None:
            known = self._known[start, stop] = super().runs(start, stop)
        return known


@functools.cache
def _order(lengths: tuple[int, ...], cell: int, starts: tuple[int, ...]) -> RememberedOrder:
    return RememberedOrder(lengths, cell, starts)


def remembered_order(lengths: list[int], cell: int, starts: list[int]) -> Order:
    """In place of `Order` in the fleet, while simulated."""
    return _order(tuple(lengths), cell, tuple(starts))
