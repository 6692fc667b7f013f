"""Cores of which one part is another class."""

from __future__ import annotations

from tests.faults.trainer import MakeCore
from trainer.feed.client.core import Core
from trainer.feed.client.epochs import Epochs
from trainer.feed.client.fleet import Fleet
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.tickets import Tickets


def with_tickets(tickets: type[Tickets]) -> MakeCore:
    """Other tickets."""

    def make(options: CoreOptions, now: float) -> Core:
        core = Core(options, now)
        core.tickets = tickets(options, core.pace, core.fleet.addresses)
        return core

    return make


def with_fleet(fleet: type[Fleet]) -> MakeCore:
    """Another fleet."""

    def make(options: CoreOptions, now: float) -> Core:
        core = Core(options, now)
        core.fleet = fleet(options, core._out, core.pace.shares)
        return core

    return make


def with_epochs(epochs: type[Epochs]) -> MakeCore:
    """Other epochs."""

    def make(options: CoreOptions, now: float) -> Core:
        core = Core(options, now)
        core.fleet.epochs = epochs(options)
        return core

    return make
