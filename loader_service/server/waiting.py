"""Requests of ranks that wait until a plan is made. Their number is bounded."""

from __future__ import annotations

from collections import Counter

from stoker_proto.wire.messages import Epoch, Ticket

MAX_PER_CLIENT = 1024
"""Waiting tickets of one connection, and waiting EPOCHs of it."""
_MAX_TICKETS = 65_536
_MAX_ENTRIES = 1 << 20  # of all EPOCHs that wait


class WaitingRequests:
    """EPOCHs and tickets by connection. A repeated request (the same pass, or the same ticket number) waits once."""

    def __init__(self) -> None:
        self._lanes: dict[tuple[bytes, str, int], dict[int, None]] = {}  # connection, split, epoch -> entries
        self._tickets: dict[tuple[bytes, int], tuple[Ticket, bytes]] = {}  # connection, number -> ticket, its frame
        self._passes_of: Counter[bytes] = Counter()
        self._tickets_of: Counter[bytes] = Counter()
        self._num_entries = 0

    def add_lanes(self, address: bytes, asked: Epoch) -> bool:
        """Add an EPOCH, with the entries that are held here. Returns False if there is no room."""
        key = address, asked.split, asked.epoch
        entries = self._lanes.get(key)
        if entries is None:
            if self._passes_of[address] >= MAX_PER_CLIENT:
                return False
            entries = {}
        new = [entry for entry in asked.entries if entry not in entries]
        if self._num_entries + len(new) > _MAX_ENTRIES:
            return False
        if key not in self._lanes:
            self._lanes[key] = entries
            self._passes_of[address] += 1
        entries.update(dict.fromkeys(new))
        self._num_entries += len(new)
        return True

    def add_ticket(self, address: bytes, ticket: Ticket, frame: bytes) -> bool:
        """Add a ticket and its frame. Returns False if there is no room."""
        key = address, ticket.ticket
        if key not in self._tickets:
            if self._tickets_of[address] >= MAX_PER_CLIENT or len(self._tickets) >= _MAX_TICKETS:
                return False
            self._tickets_of[address] += 1
        self._tickets[key] = ticket, frame
        return True

    @property
    def num_tickets(self) -> int:
        """Tickets that wait."""
        return len(self._tickets)

    def take(self) -> tuple[list[tuple[bytes, Epoch]], list[tuple[bytes, Ticket, bytes]]]:
        """Remove and return all requests in the order in which they came: (EPOCHs, tickets)."""
        lanes = [
            (address, Epoch(split=split, epoch=epoch, entries=list(entries)))
            for (address, split, epoch), entries in self._lanes.items()
        ]
        tickets = [(address, ticket, frame) for (address, _), (ticket, frame) in self._tickets.items()]
        for kept in (self._lanes, self._tickets, self._passes_of, self._tickets_of):
            kept.clear()
        self._num_entries = 0
        return lanes, tickets
