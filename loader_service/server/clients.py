"""The ranks that said HELLO, and how many tickets and rows each has in work. Both are limited."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from stoker_proto.wire.messages import Ticket

MAX_TICKETS_PER_CLIENT = 1024
"""In work at once; more are answered with FAILURE(unavailable)."""
MAX_ROWS_PER_CLIENT = 16_384
"""In work at once; more are answered with FAILURE(unavailable), a ticket that alone asks for more with `rejected`."""
_MAX_CLIENTS = 16_384
_MAX_GONE = 1024


@dataclass(slots=True)
class Client:
    """One connection that said HELLO and agreed."""

    in_work: dict[int, tuple[int, Ticket]] = field(default_factory=dict)  # its number -> worker, ticket
    num_rows: int = 0
    """Of the tickets in work."""

    def begin(self, ticket: Ticket, worker: int) -> None:
        """The worker has the ticket now."""
        self.in_work[ticket.ticket] = worker, ticket
        self.num_rows += ticket.count

    def end(self, number: int) -> None:
        """The ticket is answered. Does nothing for an unknown number."""
        found = self.in_work.pop(number, None)
        if found is not None:
            self.num_rows -= found[1].count

    def refusal(self, ticket: Ticket) -> tuple[str, str] | None:
        """(reason, message) of the FAILURE if the ticket exceeds the limits; else None."""
        if ticket.count > MAX_ROWS_PER_CLIENT:
            return "rejected", f"{ticket.count} rows at once: at most {MAX_ROWS_PER_CLIENT} are built"
        if len(self.in_work) >= MAX_TICKETS_PER_CLIENT:
            return "unavailable", f"{MAX_TICKETS_PER_CLIENT} tickets of this rank are in work"
        if self.num_rows + max(ticket.count, 0) > MAX_ROWS_PER_CLIENT:
            return "unavailable", f"{self.num_rows} rows of this rank are in work, of {MAX_ROWS_PER_CLIENT}"
        return None


class Clients:
    """Clients by address. A connection may end unnoticed, so the clients that were silent for longest are forgotten first."""

    def __init__(self) -> None:
        self._clients: OrderedDict[bytes, Client] = OrderedDict()
        self._gone: OrderedDict[bytes, None] = OrderedDict()

    def __iter__(self) -> Iterator[tuple[bytes, Client]]:
        return iter(list(self._clients.items()))

    def __len__(self) -> int:
        return len(self._clients)

    def admit(self, address: bytes) -> list[bytes]:
        """Add a client that said HELLO and agreed, perhaps again. Returns the addresses that are forgotten to make room."""
        self._clients.setdefault(address, Client())
        self._gone.pop(address, None)
        return [self._clients.popitem(last=False)[0] for _ in range(len(self._clients) - _MAX_CLIENTS)]

    def heard(self, address: bytes) -> Client | None:
        """Note a message of a client, and return the client; None for an address that was not admitted."""
        client = self._clients.get(address)
        if client is not None:
            self._clients.move_to_end(address)
        return client

    def get(self, address: bytes) -> Client | None:
        """The client; None if it was not admitted, or is gone."""
        return self._clients.get(address)

    def forget(self, address: bytes) -> None:
        """Remove a client that is gone, or that differs. Its earlier messages may still be in the queue: see `is_gone`."""
        if self._clients.pop(address, None) is not None:
            self._gone[address] = None
            if len(self._gone) > _MAX_GONE:
                self._gone.popitem(last=False)

    def is_gone(self, address: bytes) -> bool:
        """Whether the address belonged to a client that was removed recently."""
        return address in self._gone

    def tickets(self) -> Iterator[Ticket]:
        """Tickets in work, of all clients."""
        return (ticket for client in self._clients.values() for _, ticket in client.in_work.values())

    @property
    def num_in_work(self) -> int:
        """Number of tickets in work, of all clients."""
        return sum(len(client.in_work) for client in self._clients.values())
