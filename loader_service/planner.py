"""Epoch plans made ahead of need, in one background thread, and saved where the workers map them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from loader_service.plan import EpochPlan
from loader_service.prepare.manifest import EntryManifest
from stoker_proto.config import OrderConfig

logger = logging.getLogger(__name__)

LaneLengths = dict[int, list[int]]
"""entry -> samples of each of its lanes."""


class Planner:
    """`lengths(split, epoch)` is None until the plan is there; `wake` is called (from the thread) when one is."""

    def __init__(
        self,
        run_dir: Path,
        entries: Mapping[str, Mapping[int, EntryManifest]],
        order: OrderConfig,
        wake: Callable[[], None],
    ) -> None:
        self._run_dir, self._entries, self._order, self._wake = run_dir, entries, order, wake
        self._plans: dict[tuple[str, int], Future[LaneLengths]] = {}
        self._known: dict[tuple[str, int], LaneLengths] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="planner")

    def lengths(self, split: str, epoch: int) -> LaneLengths | None:
        """The lanes' lengths of an epoch; starts planning it, and then the epoch after it, where that was not done."""
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

    def _request(self, split: str, epoch: int) -> Future[LaneLengths]:
        key = (split, epoch)
        if key not in self._plans:
            self._plans[key] = self._thread.submit(self._make, split, epoch)
            self._plans[key].add_done_callback(lambda _: self._wake())
        return self._plans[key]

    def _make(self, split: str, epoch: int) -> LaneLengths:
        lengths: LaneLengths = {}
        for entry, manifest in self._entries.get(split, {}).items():
            plan = EpochPlan.make(manifest.num_samples, self._order, split=split, epoch=epoch, entry=entry)
            plan.save(self._run_dir)
            lengths[entry] = plan.lane_lengths()
        return lengths

    def _forget(self, split: str, epoch: int) -> None:
        """Drop what lies more than one epoch behind (a rank may still be in the last one)."""
        for key in [key for key in self._plans if key[0] == split and key[1] < epoch - 1 and self._plans[key].done()]:
            del self._plans[key]
            self._known.pop(key, None)
            for path in self._run_dir.glob(f"plan-{key[0]}-{key[1]}-*.npy"):
                path.unlink()
