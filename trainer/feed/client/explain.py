"""The texts of what can go wrong with the loaders: the value, the rule, and the way out. Pure."""

from __future__ import annotations

from trainer.feed.client.fleet import Fleet
from trainer.feed.client.peer import State
from trainer.feed.client.standing import NO_LANES
from trainer.feed.client.work import Work

_SHOWN = 20  # entries that one message names


def describe(fleet: Fleet, now: float) -> str:
    """Every loader with its state and last contact."""
    parts = []
    for number, loader in enumerate(fleet.loaders):
        heard = "never heard of" if loader.heard_at is None else f"last heard of {now - loader.heard_at:.1f} s ago"
        state = "draining" if loader.draining else loader.state.value
        held = f", holds entries {sorted(loader.held)}" if loader.state is State.READY else ""
        note = f" ({loader.note})" if loader.note else ""
        parts.append(f"{loader.address} {state}{note}{held}, {heard}{_standing(fleet, number, now)}")
    return "; ".join(parts)


def _standing(fleet: Fleet, number: int, now: float) -> str:
    """Why it is asked for less than its share."""
    standing = fleet.standings.of[number]
    if now < standing.trusted_at:
        return (
            f", failed {standing.failures} times in a row: home to no lanes for {standing.trusted_at - now:.1f} s more"
        )
    if standing.level:
        share = "no" if standing.level == NO_LANES else f"1/{2**standing.level} of its"
        return f", slower than others: home to {share} lanes"
    return ""


def missing(fleet: Fleet, now: float) -> str:
    """The entries that no ready loader holds, and those whose holders are all silent."""
    uncovered = set(fleet.uncovered())
    awake: set[int] = set()
    for number, loader in enumerate(fleet.loaders):
        if loader.state is State.READY and not fleet.silent(number, now):
            awake |= loader.held
    silent = set(range(len(fleet.options.entries))) - awake - uncovered
    parts = (("held by no ready loader", uncovered), ("held by loaders that do not answer", silent))
    return "".join(f"; {what}: {_entries(fleet, numbers)}" for what, numbers in parts if numbers)


def _entries(fleet: Fleet, numbers: set[int]) -> str:
    options = fleet.options
    names = [f"entry {n}, {options.entries[n]}" for n in sorted(numbers)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def still_waiting(fleet: Fleet, now: float) -> str:
    """Said once at the start."""
    return f"still waiting{missing(fleet, now)}; loaders: {describe(fleet, now)}"


def not_connected(fleet: Fleet, now: float) -> str:
    """The connect deadline has passed."""
    return (
        f"no loaders that together hold all the data answered within {fleet.options.connect_deadline_s:g} s "
        f"(trainer.feed.connect_deadline_s){missing(fleet, now)}; loaders: {describe(fleet, now)}; check that loader-serve runs "
        "there, that its --bind is one of these addresses, and that its --shards cover the entry"
    )


def no_data(fleet: Fleet, tickets: int, first: Work | None, now: float) -> str:
    """The data deadline has passed. first: what everything waits for."""
    where = "" if first is None else f", the first of {first}"
    return (
        f"no data for {fleet.options.data_deadline_s:g} s (trainer.feed.data_deadline_s), {tickets} tickets unanswered"
        f"{where}{missing(fleet, now)}; loaders: {describe(fleet, now)}; bring a loader back and start again: the run resumes "
        "from its last checkpoint"
    )
