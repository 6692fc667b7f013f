"""Epoch plans made ahead of need, in one background thread, and saved where the workers map them."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loader_service.manifest import EntryManifest
from loader_service.plan.lane_plan import PlanKey, plan_file
from loader_service.plan.plan_files import make_plan
from stoker_proto.config import DataConfig
from stoker_proto.host.trouble import host_error
from stoker_proto.wire.messages import Epoch, Lanes

logger = logging.getLogger(__name__)

_KEEP_PLANS = 8  # of each entry and split, beside those with tickets in work ...
_MOST_PLANS = 32  # ... and with them
_KEEP_LANES = 4096  # over all: some KB each
_MAX_IN_THE_MAKING = 32
RETRY_S = 1.0
"""Seconds between two attempts to make a plan, after trouble of the host."""
_ATTEMPTS_PER_WARNING = 30
_RECORDS_PER_ASKED = 4096
"""The next epoch of an entry is planned after one request per this number of records. A plan of a million records takes a core
for 0.2 s, which the first pieces of a run need more. Small sets are planned at once, and always before their epoch ends."""


@dataclass(frozen=True, slots=True)
class PlannedLanes:
    """What ranks need to know about an entry's lanes in one epoch: one number per lane."""

    lengths: list[int]
    """Rows of each lane."""
    starts: list[int]
    """Start of each lane, in units of 2**-32 of the epoch."""


class Planner:
    """`lanes` and `plan` return None until the plan is made; then `wake` is called, from the thread.

    Ranks of a weighted mixture ask for the lanes of a hundred passes at once, long before they ask for rows of most of them. So
    the lanes are remembered, and plan files are kept only for passes with tickets.
    """

    def __init__(
        self,
        run_dir: Path,
        entries: Mapping[str, Mapping[int, EntryManifest]],
        data: DataConfig,
        wake: Callable[[], None],
        in_work: Callable[[], Set[PlanKey]] = frozenset,
    ) -> None:
        """in_work: returns the plans of tickets in work, which workers may be about to map."""
        self._in_work = in_work
        self._known: OrderedDict[PlanKey, PlannedLanes] = OrderedDict()
        self._run_dir, self._entries, self._data, self._wake = run_dir, entries, data, wake
        self._plans: dict[tuple[str, int], OrderedDict[int, Future[PlannedLanes]]] = {
            (split, entry): OrderedDict() for split, manifests in entries.items() for entry in manifests
        }
        """For each entry: epoch -> its plan, the last requested last."""
        self._asked: dict[tuple[str, int], int] = dict.fromkeys(self._plans, 0)
        """How often each entry was asked for since its next epoch was planned."""
        self._made: dict[PlanKey, PlannedLanes] = {}
        """Of plans in `_plans` that are made: a look at a future takes its lock."""
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def lanes(self, key: PlanKey) -> PlannedLanes | None:
        """The lanes of an entry that this loader holds; None until they are known."""
        known = self._known.get(key)
        if known is not None:
            return known
        lanes = self._planned(key)
        if lanes is not None and self._next(key) not in self._known:
            self._plan_next(key)
        return lanes

    def plan(self, key: PlanKey) -> PlannedLanes | None:
        """The lanes, once workers can map the plan; None before. Starts planning, and later plans the next epoch."""
        lanes = self._planned(key)
        if lanes is not None:
            self._plan_next(key)
        return lanes

    def _planned(self, key: PlanKey) -> PlannedLanes | None:
        """The lanes, once workers can map the plan; None before. Starts planning."""
        future = self._request(key)
        if future is None:
            return None
        lanes = self._made.get(key)
        if lanes is None and future.done():  # asked for the first time since it was made
            lanes = self._made[key] = self._remember(key, future.result())
        return lanes

    @staticmethod
    def _next(key: PlanKey) -> PlanKey:
        return PlanKey(key.split, key.epoch + 1, key.entry)

    def _plan_next(self, key: PlanKey) -> None:
        """Count a request for an epoch whose next one has no plan; after some of them, plan the next."""
        split, epoch, entry = key
        if split != "train" or epoch + 1 in self._plans[split, entry]:
            return
        self._asked[split, entry] += 1
        if self._asked[split, entry] > len(self._entries[split][entry].num_samples) // _RECORDS_PER_ASKED:
            self._asked[split, entry] = 0
            self._request(self._next(key))

    def answer(self, asked: Epoch, tokens: Mapping[int, int]) -> Lanes | None:
        """The lanes of the entries asked for, all held here; None until all are planned. tokens: entry -> tokens of its
        samples."""
        found = {entry: self.lanes(PlanKey(asked.split, asked.epoch, entry)) for entry in asked.entries}
        lanes = {entry: planned for entry, planned in found.items() if planned is not None}
        if len(lanes) < len(found):
            return None
        return Lanes(
            split=asked.split,
            epoch=asked.epoch,
            lengths={entry: planned.lengths for entry, planned in lanes.items()},
            starts={entry: planned.starts for entry, planned in lanes.items()},
            tokens={entry: tokens[entry] for entry in lanes},
        )

    def close(self) -> None:
        """Wait for the thread."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _request(self, key: PlanKey) -> Future[PlannedLanes] | None:
        """The plan, made or being made; None if too many are being made: ask again later."""
        plans, epoch = self._plans[key.split, key.entry], key.epoch
        if epoch in plans:
            plans.move_to_end(epoch)
            return plans[epoch]
        if sum(not future.done() for plans in self._plans.values() for future in plans.values()) >= _MAX_IN_THE_MAKING:
            return None
        future = plans[epoch] = self._thread.submit(self._make, key)
        future.add_done_callback(lambda _: self._wake())
        self._forget(key.split, key.entry)
        return future

    def _make(self, key: PlanKey) -> PlannedLanes:
        """Make and save a plan; after trouble of the host (a full TMPDIR, no descriptors), retry until it works."""
        for attempt in itertools.count():
            try:
                plan = make_plan(self._entries[key.split][key.entry], self._data, key)
                plan.save(self._run_dir)
                break
            except Exception as error:
                trouble = host_error(error, f"the plan of {key.split} epoch {key.epoch} in {self._run_dir}")
                if trouble is None:
                    raise
                if attempt % _ATTEMPTS_PER_WARNING == 0:
                    logger.warning("%s; tried again every %g s, and ranks wait for it", trouble, RETRY_S)
                if self._closing.wait(RETRY_S):
                    raise trouble from error
        return PlannedLanes(plan.lane_lengths(), plan.lane_starts())

    def _remember(self, key: PlanKey, lanes: PlannedLanes) -> PlannedLanes:
        self._known[key] = lanes
        if len(self._known) > _KEEP_LANES:
            self._known.popitem(last=False)
        return lanes

    def _forget(self, split: str, entry: int) -> None:
        """Keep only the plans that were asked for last, since ranks are in one epoch, or at the border between two; and those
        with tickets in work, up to a bound."""
        plans = self._plans[split, entry]
        if len(plans) <= _KEEP_PLANS:
            return
        in_work = self._in_work()
        for epoch in list(plans)[:-_KEEP_PLANS]:
            key = PlanKey(split, epoch, entry)
            if plans[epoch].done() and (key not in in_work or len(plans) > _MOST_PLANS):
                future = plans.pop(epoch)
                self._made.pop(key, None)
                if future.exception() is None:
                    self._remember(key, future.result())
                # `ends` goes first: a worker that does not find it uses none of the others.
                for name in ("ends", "*"):
                    for path in self._run_dir.glob(plan_file(self._run_dir, key, name).name):
                        path.unlink()
