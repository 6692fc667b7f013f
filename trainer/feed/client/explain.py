"""Error texts about loaders: the value, the rule, and the way out. Pure."""

from __future__ import annotations

from trainer.feed.client.fleet import Fleet, Loader, State
from trainer.feed.client.pace import NO_LANES
from trainer.feed.client.tickets import PendingTicket

_SHOWN = 20  # entries that one message names


def describe(fleet: Fleet, now: float) -> str:
    """Every loader with its state and last contact, and where none was found."""
    parts = [f"{entry} names none now ({why})" for entry, why in fleet.not_found.items()]
    for number, loader in enumerate(fleet.loaders):
        if loader.state is State.LEFT:
            continue
        heard = "never heard of" if loader.heard_at is None else f"last heard of {now - loader.heard_at:.1f} s ago"
        state = "draining" if loader.draining else loader.state.value
        held = f", holds entries {sorted(loader.held)}{_without(loader)}" if loader.state is State.READY else ""
        note = f" ({loader.note})" if loader.note else ""
        parts.append(f"{loader.address} {state}{note}{held}, {heard}{_share(fleet, number, now)}")
    return "; ".join(parts) or "none"


def _share(fleet: Fleet, number: int, now: float) -> str:
    """Why the loader has fewer lanes than its full share."""
    share = fleet.shares.of[number]
    if now < share.excluded_until:
        return f", failed {share.failures} times in a row: home to no lanes for {share.excluded_until - now:.1f} s more"
    if share.level:
        part = "no" if share.level == NO_LANES else f"1/{2**share.level} of its"
        return f", slower than others: home to {part} lanes"
    return ""


def _without(loader: Loader) -> str:
    """Of which entries the loader holds a part only."""
    parts = sorted(entry for entry, missing in loader.missing.items() if missing)
    return f" (of {parts} a part only)" if parts else ""


def missing(fleet: Fleet, now: float) -> str:
    """The entries and shards that no ready loader holds, and those whose holders are all silent."""
    uncovered = set(fleet.uncovered())
    awake: set[int] = set()
    for number, loader in enumerate(fleet.loaders):
        if loader.state is State.READY and not fleet.silent(number, now):
            awake |= loader.held
    silent = set(range(len(fleet.options.entries))) - awake - uncovered
    parts = (("held by no ready loader", uncovered), ("held by loaders that do not answer", silent))
    text = "".join(f"; {what}: {_entries(fleet, numbers)}" for what, numbers in parts if numbers)
    gaps = fleet.gaps(fleet.ready())
    awake_gaps = fleet.gaps(number for number in fleet.ready() if not fleet.silent(number, now))
    for what, found in ((parts[0][0], gaps), (parts[1][0], {n: m for n, m in awake_gaps.items() if n not in gaps})):
        for entry, shards in list(found.items())[:_SHOWN]:
            names = "; ".join(map(str, shards[:_SHOWN])) + (" ..." if len(shards) > _SHOWN else "")
            text += f"; {what}: of {_entries(fleet, {entry})}: {names}"
    return text


def _entries(fleet: Fleet, numbers: set[int]) -> str:
    options = fleet.options
    names = [f"entry {n}, {options.entries[n]}" for n in sorted(numbers)]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def still_waiting(fleet: Fleet, now: float) -> str:
    """Warning, once at the start."""
    return f"still waiting{missing(fleet, now)}; loaders: {describe(fleet, now)}"


def not_connected(fleet: Fleet, now: float) -> str:
    """Error: the connect deadline has passed."""
    return (
        f"no loaders that together hold all the data answered within {fleet.options.feed.connect_deadline_s:g} s "
        f"(trainer.feed.connect_deadline_s){missing(fleet, now)}; loaders: {describe(fleet, now)}; check that loader-serve runs "
        "there, that its --bind is one of these addresses, and that its --shards cover the entry"
    )


def no_data(fleet: Fleet, tickets: int, first: PendingTicket | None, now: float) -> str:
    """Error: the data deadline has passed. first: the ticket that the rank waits for."""
    where = "" if first is None else f", the first of {first}"
    return (
        f"no data for {fleet.options.feed.data_deadline_s:g} s (trainer.feed.data_deadline_s), {tickets} tickets unanswered"
        f"{where}{missing(fleet, now)}; loaders: {describe(fleet, now)}; bring a loader back and start again: the run resumes "
        "from its last checkpoint"
    )
