"""Epoch plans made ahead of need, in one background thread, and saved where the workers map them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loader_service.plan import EpochPlan
from loader_service.prepare.manifest import EntryManifest
from stoker_proto.config import OrderConfig

_KEEP_PLANS = 8
_MAX_IN_THE_MAKING = 4


@dataclass(frozen=True, slots=True)
class PlannedLanes:
    """What ranks must know of an epoch's lanes: entry -> one number for each lane."""

    lengths: dict[int, list[int]]
    """Samples."""
    starts: dict[int, list[int]]
    """When it begins, in units of 2**-32 of the epoch."""


class Planner:
    """`lanes(split, epoch)` is None until the plan is there; `wake` is called (from the thread) when one is."""

    def __init__(
        self,
        run_dir: Path,
        entries: Mapping[str, Mapping[int, EntryManifest]],
        order: OrderConfig,
        wake: Callable[[], None],
    ) -> None:
        self._run_dir, self._entries, self._order, self._wake = run_dir, entries, order, wake
        self._plans: OrderedDict[tuple[str, int], Future[PlannedLanes]] = OrderedDict()  # the last asked is the last
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def lanes(self, split: str, epoch: int) -> PlannedLanes | None:
        """The lanes of an epoch; starts planning it, and then the epoch after it, where that was not done."""
        future = self._request(split, epoch)
        if future is None or not future.done():
            return None
        if split == "train" and (split, epoch + 1) not in self._plans:
            self._request(split, epoch + 1)
        return future.result()

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _request(self, split: str, epoch: int) -> Future[PlannedLanes] | None:
        """The plan, made or in the making; None where too many are being made already: ask again later."""
        key = (split, epoch)
        if key in self._plans:
            self._plans.move_to_end(key)
            return self._plans[key]
        if sum(not future.done() for future in self._plans.values()) >= _MAX_IN_THE_MAKING:
            return None
        future = self._plans[key] = self._thread.submit(self._make, split, epoch)
        future.add_done_callback(lambda _: self._wake())
        self._forget()
        return future

    def _make(self, split: str, epoch: int) -> PlannedLanes:
        planned = PlannedLanes({}, {})
        for entry, manifest in self._entries.get(split, {}).items():
            plan = EpochPlan.make(manifest.num_samples, self._order, split=split, epoch=epoch, entry=entry)
            plan.save(self._run_dir)
            planned.lengths[entry] = plan.lane_lengths()
            planned.starts[entry] = plan.lane_starts()
        return planned

    def _forget(self) -> None:
        """Keep only the plans that were asked for last: ranks are in one epoch, or at the border between two."""
        for split, epoch in list(self._plans)[:-_KEEP_PLANS]:
            if self._plans[split, epoch].done():
                del self._plans[split, epoch]
                for path in self._run_dir.glob(f"plan-{split}-{epoch}-*.npy"):
                    path.unlink()
