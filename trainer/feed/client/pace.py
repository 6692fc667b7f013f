"""How fast each loader answers, and what follows from it: deadlines, hedges, and each loader's share of the lanes. Pure.

    Latencies    seconds that answers take      -> when to ask a second loader (a hedge), and the deadline of a ticket
    HedgeBudget  how many hedges may be sent
    Load         samples per busy second        -> which loader is overloaded while another is idle
    LaneShares   share of the lanes of a loader -> fewer lanes for a slow loader, none for one that comes and goes
    Pace         the four together; the tickets report every attempt to it

Time is an argument: seconds of a monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from stoker_proto.wire.messages import Ticket
from trainer.feed.client.options import CoreOptions

# -- latencies

_RECENT = 64
"""Answers of one loader that the estimate uses."""
ENOUGH = 8
"""With fewer answers there is no estimate: the first answers include reading the loader's first windows."""
_EVERY = 8
"""Answers between two computations of the quantiles."""
_HIGH = 0.95
_DEADLINE = 8.0
"""A ticket's deadline, as a multiple of the expected latency."""
_COLD = 4.0
"""Factor on both waits for the first ticket of a lane: the loader must read and decode the lane's window first."""


class Latency:
    """Recent answers of one loader, in seconds."""

    __slots__ = ("_recent", "high", "lately", "middle", "num_seen")

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self.num_seen = 0
        self.middle = self.high = self.lately = 0.0

    @property
    def known(self) -> bool:
        """Whether there were enough answers for an estimate."""
        return self.num_seen >= ENOUGH

    def observe(self, seconds: float) -> None:
        """Add one answer, or the time that an unanswered ticket has taken so far."""
        self._recent.append(seconds)
        self.num_seen += 1
        if self.num_seen < ENOUGH or self.num_seen % _EVERY == 0:
            ordered, newest = sorted(self._recent), sorted(list(self._recent)[-_EVERY:])
            self.middle, self.high = ordered[len(ordered) // 2], ordered[int(_HIGH * len(ordered))]
            self.lately = newest[len(newest) // 2]


class Latencies:
    """Latencies of all loaders of one rank, and the lanes that each loader has answered (it holds their windows).

    The expected latency does not depend on the loader alone: a loader that hangs or slows down would then get longer and longer
    waits. It is the larger of two values: this loader's median, and the high quantile of the fastest other loader. The median
    does not change while fewer than half of the recent answers are slow.
    """

    def __init__(self, options: CoreOptions) -> None:
        self._options = options
        self.of = [Latency() for _ in options.addresses]
        self._warm: list[dict[int, int]] = [{} for _ in options.addresses]  # loader -> lane -> its newest epoch

    def add(self) -> None:
        """One more loader."""
        self.of.append(Latency())
        self._warm.append({})

    def answered(self, loader: int, ticket: Ticket, seconds: float) -> None:
        """A piece came."""
        self.of[loader].observe(seconds)
        warm = self._warm[loader]
        warm[ticket.lane] = max(warm.get(ticket.lane, 0), ticket.epoch)

    def gave_up(self, loader: int, seconds: float) -> None:
        """The rank stopped waiting for the loader's answer after these seconds."""
        self.of[loader].observe(seconds)

    def forget(self, loader: int) -> None:
        """The incarnation is gone: the next one at this address starts without an estimate."""
        self.of[loader] = Latency()
        self._warm[loader].clear()

    def expected(self, loader: int) -> float | None:
        """Seconds that an answer may normally take; None while all loaders together gave too few answers."""
        own = self.of[loader]
        others = [latency for number, latency in enumerate(self.of) if number != loader and latency.num_seen]
        if sum(latency.num_seen for latency in others) >= ENOUGH:
            return max(own.middle, min(latency.high for latency in others))
        return own.high if own.known else None

    def is_slow(self, loader: int) -> bool:
        """Whether the loader's last answers took more than twice as long as those of the fastest other loader."""
        own = self.of[loader]
        others = [latency.lately for number, latency in enumerate(self.of) if number != loader and latency.known]
        return own.known and bool(others) and own.lately > 2 * max(min(others), self._options.shortest_hedge_s / 4)

    def waits(self, loader: int, ticket: Ticket) -> tuple[float, float]:
        """(seconds until a second loader is asked as well, seconds until the deadline, when another is asked instead)."""
        options, feed, expected_s = self._options, self._options.feed, self.expected(loader)
        if expected_s is None:
            return float("inf"), feed.ticket_deadline_s
        newest = self._warm[loader].get(ticket.lane, -1)
        scale = 1.0 if ticket.epoch <= newest <= ticket.epoch + 1 else _COLD
        hedge_s = scale * max(feed.hedge_multiple * expected_s, options.shortest_hedge_s)
        if not self.of[loader].known:
            hedge_s = float("inf")
        deadline_s = scale * max(_DEADLINE * expected_s, options.shortest_deadline_s)
        return hedge_s, min(deadline_s, feed.ticket_deadline_s)


# -- hedges

BURST = 4
"""Hedges beyond the share."""


class HedgeBudget:
    """A token bucket: each new ticket fills it, each hedge empties it.

    A hedge makes a second loader do the same work, just when the fleet may be slow because it has too much work. So at all times

        hedges <= share x tickets + BURST
    """

    def __init__(self, share: float) -> None:
        """share: hedges per ticket; 0: no hedges."""
        self._share = share
        self._tokens = float(BURST) if share else 0.0

    def ticket(self) -> None:
        """A new ticket was sent for the first time."""
        self._tokens = min(self._tokens + self._share, float(BURST))

    def spend(self) -> bool:
        """Whether one more hedge may be sent; if so, counts it."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    @property
    def has_any(self) -> bool:
        """Whether the next hedge may be sent."""
        return self._tokens >= 1.0


# -- load

_NEW = 0.5
"""Weight of the newest look in the running averages."""
_BUSY, _IDLE = 0.8, 0.6
"""A loader with open tickets for a larger share of the time is busy, for a smaller share idle."""
_MEASURED = 0.05
"""Samples per second are computed over at least this share of the time between two looks, if needed over several looks."""
_GRACE = 6
"""Looks after a loader's first ticket in which it cannot count as overloaded: it reads its first windows."""


@dataclass(slots=True)
class LoaderLoad:
    """Load of one loader."""

    num_open: int = 0
    since: float = 0.0
    """Start of the open time that is not in `busy_s` yet."""
    busy_s: float = 0.0
    samples: int = 0
    num_looks: int = 0
    """Since its first ticket."""
    busy: float = 0.0
    """Running average of the share of the time with open tickets."""
    paced_s: float = 0.0
    """Busy seconds that are not in `pace` yet; `paced_samples` came in them."""
    paced_samples: int = 0
    pace: float | None = None
    """Running average of samples per busy second."""


class Load:
    """Load of all loaders of one rank: which loader is overloaded while another is idle.

    Latencies cannot tell. Where the trainer takes everything that comes, open tickets collect at the slowest loader, even if it
    is only a tenth slower. Its latency is then many times that of the others. The evidence is a loader's samples per second over
    the time with open tickets, together with another loader that had none. No loader loses lanes while the trainer has enough
    data.
    """

    def __init__(self, options: CoreOptions, now: float) -> None:
        self._options = options
        self.of = [LoaderLoad() for _ in options.addresses]
        self._looked_at = self._told_at = now
        self._starving, self._starved_s = False, 0.0

    def asked(self, loader: int, now: float) -> None:
        """One more ticket is open at the loader."""
        load = self.of[loader]
        load.num_looks = load.num_looks or 1
        if not load.num_open:
            load.since = now
        load.num_open += 1

    def settled(self, loader: int, samples: int, now: float) -> None:
        """One ticket less is open; samples: how many its answer brought."""
        load = self.of[loader]
        load.num_open -= 1
        load.samples += samples
        if not load.num_open:
            load.busy_s += now - load.since

    def forget(self, loader: int) -> None:
        """The incarnation is gone, and none of its tickets is open any more."""
        self.of[loader] = LoaderLoad()

    def reset_pace(self, loader: int) -> None:
        """The loader gets lanes back: measure it anew, as its old pace may be its worst one."""
        load = self.of[loader]
        load.pace, load.paced_s, load.paced_samples = None, 0.0, 0

    def starving(self, starving: bool, now: float) -> None:
        """Whether the trainer waits for data now."""
        self._starved_s += (now - self._told_at) * self._starving
        self._starving, self._told_at = starving, now

    def next_time(self) -> float:
        """When `look` has something to find."""
        return self._looked_at + self._options.look_s if self._starving else float("inf")

    def look(self, now: float, helps: Callable[[int, int], bool]) -> list[tuple[int, int]] | None:
        """(overloaded loader, share level that matches its pace) of each; None: too early to look again.

        helps: (loader, other) -> whether the other is ready and holds some of the same data.
        """
        elapsed = now - self._looked_at
        if now < self._looked_at + self._options.look_s:
            return None
        self.starving(self._starving, now)
        starved = self._starved_s >= elapsed / 2
        self._looked_at, self._starved_s = now, 0.0
        for load in self.of:
            self._average(load, elapsed, now)
        ratio = self._options.feed.takeover_ratio
        if not starved or not ratio:
            return []
        found = []
        for number, load in enumerate(self.of):
            if load.busy < _BUSY or load.num_looks <= _GRACE or load.pace is None:
                continue
            paces = [
                other.pace
                for index, other in enumerate(self.of)
                if other.pace is not None and other.busy < _IDLE and helps(number, index)
            ]
            faster = max(paces, default=0.0) / max(load.pace, 1e-9)
            if faster >= ratio:
                found.append((number, math.ceil(math.log2(faster))))
        return found

    @staticmethod
    def _average(load: LoaderLoad, elapsed: float, now: float) -> None:
        if load.num_open:
            load.busy_s += now - load.since
            load.since = now
        load.num_looks += load.num_looks > 0
        load.busy += _NEW * (load.busy_s / elapsed - load.busy)
        load.paced_s, load.paced_samples = load.paced_s + load.busy_s, load.paced_samples + load.samples
        if load.paced_s > _MEASURED * elapsed:
            pace = load.paced_samples / load.paced_s
            load.pace = pace if load.pace is None else load.pace + _NEW * (pace - load.pace)
            load.paced_s, load.paced_samples = 0.0, 0
        load.busy_s, load.samples = 0.0, 0


# -- shares of the lanes

NO_LANES = 5
"""The level at which a loader has no lanes, as long as others are ready."""
_LONGEST_HOLD = 16
"""A hold doubles up to this multiple of the first one."""


@dataclass(slots=True)
class LaneShare:
    """Share of one address, over all its incarnations."""

    level: int = 0
    lowered_at: float = float("-inf")
    hold_s: float = 0.0
    hold_until: float = 0.0
    failures: int = 0
    """In a row, each soon after the loader had joined."""
    joined_at: float = 0.0
    excluded_until: float = float("-inf")
    """No lanes before this time."""


class LaneShares:
    """Shares of all loaders of one rank.

    Level 0 is a full share, each further level halves it, NO_LANES is none. Whole lanes move, and stay away for a while, so
    that a window is answered by the loader that decoded it.

        slow       the level that matches its pace, at once; after a hold one level back, and so on. The hold doubles if
                   the share had to be lowered again soon after.
        flapping   from the second failure in a row on NO_LANES for 1, 2, 4 ... s after it has come back
    """

    def __init__(self, options: CoreOptions) -> None:
        self._options = options
        self.of = [LaneShare() for _ in options.addresses]

    def level(self, loader: int, now: float) -> int:
        """0: a full share of the lanes; NO_LANES: none, as long as others are ready."""
        share = self.of[loader]
        return NO_LANES if now < share.excluded_until else share.level

    def forget(self, loader: int) -> None:
        """The number stands for another address now."""
        self.of[loader] = LaneShare()

    def joined(self, loader: int, now: float) -> None:
        """It said WELCOME."""
        share, options = self.of[loader], self._options
        share.joined_at = now
        if share.failures >= 2:  # a single failure is forgiven
            backoff_s = options.first_backoff_s * 2.0 ** min(share.failures - 2, 30)
            share.excluded_until = now + min(backoff_s, options.feed.backoff_s)

    def failed(self, loader: int, now: float) -> None:
        """It was ready, and is gone without a DRAIN."""
        share = self.of[loader]
        steady = now >= share.joined_at + self._options.steady_s
        share.failures = 1 if steady else share.failures + 1

    def lower(self, loader: int, level: int, now: float) -> bool:
        """Lower its share to this level for a hold; returns whether that changed anything. At most once per `look_s`."""
        share, options = self.of[loader], self._options
        level = min(level, NO_LANES)
        if level <= share.level or now < share.lowered_at + options.look_s:
            return False
        again = now < share.lowered_at + 4 * max(share.hold_s, options.hold_s)
        longest = _LONGEST_HOLD * options.hold_s
        share.hold_s = min(2 * share.hold_s, longest) if again and share.hold_s else options.hold_s
        share.level, share.lowered_at, share.hold_until = level, now, now + share.hold_s
        return True

    def ended_holds(self, now: float) -> list[int]:
        """Loaders with a lowered share whose hold is over."""
        return [number for number, one in enumerate(self.of) if one.level and now >= one.hold_until]

    def restore(self, loader: int, now: float, *, still_slow: bool) -> None:
        """Raise its share by one level, or hold again while it is still slow."""
        share = self.of[loader]
        share.level -= not still_slow
        share.hold_until = now + share.hold_s


# -- together

_LONGEST_DEADLINE = 4
"""A ticket's deadline doubles with each round over all loaders, up to this multiple of the first deadline or to the configured
one, whichever is larger. A loader may need longer than estimated, but what an outage lost must be asked for again soon, long
before the data deadline."""


@dataclass(slots=True)
class Attempt:
    """A ticket sent to one loader that may still answer it."""

    loader: int
    asked_at: float
    hedge_at: float
    """From this time on a second loader may be asked as well."""
    deadline: float
    look_at: float
    """When to look at it next: first to see whether the loader is alive, then at the deadline."""
    is_hedge: bool = False
    late: bool = False
    """Past its deadline: another loader may be asked, but this answer is still accepted."""


class Pace:
    """What one rank knows of its loaders' pace. It hears of every attempt and of its end."""

    def __init__(self, options: CoreOptions, now: float) -> None:
        self._options = options
        self.latencies = Latencies(options)
        self.load = Load(options, now)
        self.shares = LaneShares(options)
        self.budget = HedgeBudget(options.feed.hedge_share)
        self.samples = [0] * len(options.addresses)
        """Samples that each loader brought, over all its incarnations."""
        self._seen = [0] * len(options.addresses)  # answers of each loader when its share was last changed

    def join(self, loader: int) -> None:
        """A loader of another address gets this number: the next one, or that of a loader that has left."""
        if loader == len(self._seen):
            self.latencies.add()
            self.load.of.append(LoaderLoad())
            self.shares.of.append(LaneShare())
            self._seen.append(0)
            self.samples.append(0)
            return
        self.gone(loader)
        self.shares.forget(loader)
        self._seen[loader] = self.samples[loader] = 0

    # -- attempts

    def asked(self, loader: int, ticket: Ticket, rounds: int, now: float) -> Attempt:
        """A ticket goes to a loader; rounds: how often all loaders were tried before."""
        self.load.asked(loader, now)
        hedge_s, deadline_s = self._waits(loader, ticket, rounds)
        look_at = now + min(hedge_s, deadline_s, self._options.shortest_deadline_s)
        return Attempt(loader, now, now + hedge_s, now + deadline_s, look_at)

    def still_open(self, attempt: Attempt, ticket: Ticket, rounds: int, now: float) -> None:
        """It has been open for long: what was learned since it was sent may shorten the wait."""
        hedge_s, deadline_s = self._waits(attempt.loader, ticket, rounds)
        attempt.hedge_at = min(attempt.hedge_at, attempt.asked_at + hedge_s)
        attempt.deadline = min(attempt.deadline, attempt.asked_at + deadline_s)
        attempt.look_at = min(attempt.deadline, now + self._options.shortest_deadline_s)

    def _waits(self, loader: int, ticket: Ticket, rounds: int) -> tuple[float, float]:
        hedge_s, first_s = self.latencies.waits(loader, ticket)
        longest_s = max(_LONGEST_DEADLINE * first_s, self._options.feed.ticket_deadline_s)
        return hedge_s, min(first_s * 2.0 ** min(rounds, 30), longest_s)

    def answered(self, attempt: Attempt, ticket: Ticket, now: float) -> None:
        """Its piece came first; no other answer to the ticket is needed."""
        self.load.settled(attempt.loader, ticket.num_rows, now)
        self.samples[attempt.loader] += ticket.num_rows
        self.latencies.answered(attempt.loader, ticket, now - attempt.asked_at)

    def beaten(self, attempt: Attempt, now: float) -> None:
        """Another loader's piece came first."""
        self.load.settled(attempt.loader, 0, now)
        if not attempt.late:
            self.latencies.gave_up(attempt.loader, now - attempt.asked_at)

    def ended(self, attempt: Attempt, now: float) -> None:
        """It ended in another way: a failure, a lost connection, or the ticket is no longer needed."""
        self.load.settled(attempt.loader, 0, now)

    def expired(self, attempt: Attempt, now: float) -> None:
        """It is past its deadline and may still be answered."""
        self.latencies.gave_up(attempt.loader, now - attempt.asked_at)

    def gone(self, loader: int) -> None:
        """The incarnation is gone, and all its attempts have ended."""
        self.latencies.forget(loader)
        self.load.forget(loader)

    # -- lanes

    def lower(self, loader: int, level: int, now: float) -> bool:
        """Lower a loader's share of the lanes to this level, by at least one; returns whether that changed anything."""
        changed = self.shares.lower(loader, max(level, self.shares.of[loader].level + 1), now)
        if changed:
            self._seen[loader] = self.latencies.of[loader].num_seen
        return changed

    def look(self, now: float, helps: Callable[[int, int], bool]) -> list[int]:
        """Lower the shares of overloaded loaders, raise those whose hold is over; returns the lowered. helps: see `Load.look`."""
        found = self.load.look(now, helps)
        if found is None:
            return []
        for loader in self.shares.ended_holds(now):
            measured = self.latencies.of[loader].num_seen - self._seen[loader] >= ENOUGH
            still_slow = measured and self.latencies.is_slow(loader)
            self.shares.restore(loader, now, still_slow=still_slow)
            self._seen[loader] = self.latencies.of[loader].num_seen
            if not still_slow:
                self.load.reset_pace(loader)
        return [loader for loader, level in found if self.lower(loader, level, now)]
