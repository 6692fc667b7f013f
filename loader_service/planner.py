"""Epoch plans made ahead of need, in one background thread, and saved where the workers map them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loader_service.plans import make_plan
from loader_service.prepare.manifest import EntryManifest
from stoker_proto.config import DataConfig

_KEEP_PLANS = 8  # of each entry and split
_MAX_IN_THE_MAKING = 32
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


class Planner:
    """`lanes(split, epoch, entry)` is None until the plan is there; `wake` is called (from the thread) when one is."""

    def __init__(
        self,
        run_dir: Path,
        entries: Mapping[str, Mapping[int, EntryManifest]],
        data: DataConfig,
        wake: Callable[[], None],
    ) -> None:
        self._run_dir, self._entries, self._data, self._wake = run_dir, entries, data, wake
        self._plans: dict[tuple[str, int], OrderedDict[int, Future[PlannedLanes]]] = {
            (split, entry): OrderedDict() for split, manifests in entries.items() for entry in manifests
        }
        """Of each entry the epochs, the last asked last."""
        self._asked: dict[tuple[str, int], int] = dict.fromkeys(self._plans, 0)
        """How often since its next epoch was begun."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def lanes(self, split: str, epoch: int, entry: int) -> PlannedLanes | None:
        """The lanes of an entry that is held; starts planning them, and later the next epoch, where that was not done."""
        future = self._request(split, epoch, entry)
        if future is None or not future.done():
            return None
        if split == "train" and epoch + 1 not in self._plans[split, entry]:
            self._asked[split, entry] += 1
            if self._asked[split, entry] > len(self._entries[split][entry].num_samples) // _RECORDS_PER_ASKED:
                self._asked[split, entry] = 0
                self._request(split, epoch + 1, entry)
        return future.result()

    def close(self) -> None:
        """Wait for the thread."""
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
        plan = make_plan(self._entries[split][entry], self._data, split=split, epoch=epoch, entry=entry)
        plan.save(self._run_dir)
        return PlannedLanes(plan.lane_lengths(), plan.lane_starts())

    def _forget(self, split: str, entry: int) -> None:
        """Keep only the plans that were asked for last: ranks are in one epoch, or at the border between two."""
        plans = self._plans[split, entry]
        for epoch in list(plans)[:-_KEEP_PLANS]:
            if plans[epoch].done():
                del plans[epoch]
                for path in self._run_dir.glob(f"plan-{split}-{epoch}-{entry}-*.npy"):
                    path.unlink()
