"""Epoch plans made ahead of need, in one background thread, and saved where the workers map them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loader_service.plan import EpochPlan
from loader_service.prepare.manifest import EntryManifest
from stoker_proto.config import OrderConfig

logger = logging.getLogger(__name__)


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
        self._plans: dict[tuple[str, int], Future[PlannedLanes]] = {}
        self._known: dict[tuple[str, int], PlannedLanes] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def lanes(self, split: str, epoch: int) -> PlannedLanes | None:
        """The lanes of an epoch; starts planning it, and then the epoch after it, where that was not done."""
        known = self._known.get((split, epoch))
        if known is not None:
            return known
        future = self._request(split, epoch)
        if not future.done():
            return None
        if split == "train":
            self._request(split, epoch + 1)
            self._forget(split, epoch)
        self._known[split, epoch] = future.result()
        return self._known[split, epoch]

    def close(self) -> None:
        """Wait for the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _request(self, split: str, epoch: int) -> Future[PlannedLanes]:
        key = (split, epoch)
        if key not in self._plans:
            self._plans[key] = self._thread.submit(self._make, split, epoch)
            self._plans[key].add_done_callback(lambda _: self._wake())
        return self._plans[key]

    def _make(self, split: str, epoch: int) -> PlannedLanes:
        planned = PlannedLanes({}, {})
        for entry, manifest in self._entries.get(split, {}).items():
            plan = EpochPlan.make(manifest.num_samples, self._order, split=split, epoch=epoch, entry=entry)
            plan.save(self._run_dir)
            planned.lengths[entry] = plan.lane_lengths()
            planned.starts[entry] = plan.lane_starts()
        return planned

    def _forget(self, split: str, epoch: int) -> None:
        """Drop what lies more than one epoch behind (a rank may still be in the last one)."""
        for key in [key for key in self._plans if key[0] == split and key[1] < epoch - 1 and self._plans[key].done()]:
            del self._plans[key]
            self._known.pop(key, None)
            for path in self._run_dir.glob(f"plan-{key[0]}-{key[1]}-*.npy"):
                path.unlink()
