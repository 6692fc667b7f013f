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
from loader_service.plan import lane_plan
from loader_service.plan.plan_files import make_plan
from stoker_proto.config import DataConfig
from stoker_proto.host_trouble import host_error
from stoker_proto.wire.messages import Epoch, Lanes

logger = logging.getLogger(__name__)

_KEEP_PLANS = 8  # of each entry and split, beside those with tickets in work ...
_MOST_PLANS = 32  # ... and with them
_KEEP_LANES = 4096  # over all: some KB each
_MAX_IN_THE_MAKING = 32
RETRY_S = 1.0
"""Between two attempts at a plan that trouble of the host prevents."""
_ATTEMPTS_PER_WARNING = 30
_RECORDS_PER_ASKED = 4096
"""The next epoch of an entry is planned when this one was asked for once for so many records: a plan of a million takes a core
for 0.2 s, which the first pieces need more. Small sets are planned at once, and no epoch ends before."""


@dataclass(frozen=True, slots=True)
class PlannedLanes:
    """What ranks must know of the lanes of an entry in one epoch: one number for each lane."""

    lengths: list[int]
    """Rows."""
    starts: list[int]
    """When it begins, in units of 2**-32 of the epoch."""


PlanKey = tuple[str, int, int]
"""Split, epoch, entry."""


class Planner:
    """`lanes` and `plan` of (split, epoch, entry) are None until it is planned; `wake` is called (from the thread) when one is.

    Ranks of a weighted mixture ask for the lanes of a hundred passes at once, long before they ask for rows of most: so what was
    said of lanes is remembered, and the plans' files are kept for those passes alone that tickets come for.
    """

    def __init__(
        self,
        run_dir: Path,
        entries: Mapping[str, Mapping[int, EntryManifest]],
        data: DataConfig,
        wake: Callable[[], None],
        in_work: Callable[[], Set[PlanKey]] = frozenset,
    ) -> None:
        """in_work: gives the plans of the tickets that workers were told of; they may be about to map these."""
        self._in_work = in_work
        self._known: OrderedDict[PlanKey, PlannedLanes] = OrderedDict()
        self._run_dir, self._entries, self._data, self._wake = run_dir, entries, data, wake
        self._plans: dict[tuple[str, int], OrderedDict[int, Future[PlannedLanes]]] = {
            (split, entry): OrderedDict() for split, manifests in entries.items() for entry in manifests
        }
        """Of each entry the epochs, the last asked last."""
        self._asked: dict[tuple[str, int], int] = dict.fromkeys(self._plans, 0)
        """How often since its next epoch was begun."""
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def lanes(self, split: str, epoch: int, entry: int) -> PlannedLanes | None:
        """The lanes of an entry that is held, planned now or before."""
        known = self._known.get((split, epoch, entry))
        return self.plan(split, epoch, entry) if known is None else known

    def plan(self, split: str, epoch: int, entry: int) -> PlannedLanes | None:
        """The same, and workers can map the plan; starts planning it, and later the next epoch, where that was not done."""
        future = self._request(split, epoch, entry)
        if future is None or not future.done():
            return None
        if split == "train" and epoch + 1 not in self._plans[split, entry]:
            self._asked[split, entry] += 1
            if self._asked[split, entry] > len(self._entries[split][entry].num_samples) // _RECORDS_PER_ASKED:
                self._asked[split, entry] = 0
                self._request(split, epoch + 1, entry)
        return self._remember((split, epoch, entry), future.result())

    def answer(self, asked: Epoch, tokens: Mapping[int, int]) -> Lanes | None:
        """Of the entries asked for, all of which are held; None until all are planned. tokens: entry -> of all its samples."""
        found = {entry: self.lanes(asked.split, asked.epoch, entry) for entry in asked.entries}
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

    def _request(self, split: str, epoch: int, entry: int) -> Future[PlannedLanes] | None:
        """The plan, made or in the making; None where too many are being made already: ask again later."""
        plans = self._plans[split, entry]
        if epoch in plans:
            plans.move_to_end(epoch)
            return plans[epoch]
        if sum(not future.done() for plans in self._plans.values() for future in plans.values()) >= _MAX_IN_THE_MAKING:
            return None
        future = plans[epoch] = self._thread.submit(self._make, split, epoch, entry)
        future.add_done_callback(lambda _: self._wake())
        self._forget(split, entry)
        return future

    def _make(self, split: str, epoch: int, entry: int) -> PlannedLanes:
        """Made and saved; where the host is in trouble (a full TMPDIR, no descriptors), tried again until it is not."""
        for attempt in itertools.count():
            try:
                plan = make_plan(self._entries[split][entry], self._data, lane_plan.PlanKey(split, epoch, entry))
                plan.save(self._run_dir)
                break
            except Exception as error:
                trouble = host_error(error, f"the plan of {split} epoch {epoch} in {self._run_dir}")
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
            if plans[epoch].done() and ((split, epoch, entry) not in in_work or len(plans) > _MOST_PLANS):
                future = plans.pop(epoch)
                if future.exception() is None:
                    self._remember((split, epoch, entry), future.result())
                # `ends` says that all are there: who finds the others without it takes none of them.
                key = lane_plan.PlanKey(split, epoch, entry)
                for name in ("ends", "*"):
                    for path in self._run_dir.glob(lane_plan.plan_file(self._run_dir, key, name).name):
                        path.unlink()
