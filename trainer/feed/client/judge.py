"""Who hangs, who is late, who is overloaded; what they have and what they were to have goes to others. Pure."""

from __future__ import annotations

from trainer.feed.client.balance import Balance
from trainer.feed.client.fleet import Fleet
from trainer.feed.client.tickets import Desk


class Judge:
    """Looks at the loaders of one rank whenever something may have changed."""

    def __init__(self) -> None:
        self._silent: set[int] = set()

    def __call__(self, fleet: Fleet, desk: Desk, balance: Balance, now: float) -> None:
        """Mark tickets that others are to be asked for, and lower or raise loaders' shares of the lanes."""

        def choices(lane: int, epoch: int) -> list[int]:
            return fleet.choices(lane, epoch, now)

        def helps(loader: int, other: int) -> bool:
            return fleet.helps(loader, other, now)

        loaders = range(len(fleet.loaders))
        owing, expired = desk.overdue(now)
        for loader in owing:
            fleet.owing(loader, now)
        silent = {n for n in loaders if fleet.loaders[n].waiting_since is not None and fleet.silent(n, now)}
        hangs, self._silent = silent - self._silent, silent
        if silent:
            desk.give_up_on(silent, choices)
        lowered = balance.look(now, helps)
        for loader in sorted(hangs | expired):
            if any(helps(loader, other) for other in loaders) and balance.relieve(loader, 0, now):
                lowered.append(loader)
        for loader in lowered:
            desk.counters.takeovers += 1
            desk.move(loader, choices)
