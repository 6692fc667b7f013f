"""Which plan an entry gets: made and saved by the front, loaded by the workers."""

from __future__ import annotations

from pathlib import Path

from loader_service.manifest import EntryManifest
from loader_service.plan.lane_plan import LanePlan, plan_file
from loader_service.plan.record_plan import EpochPlan
from loader_service.plan.row_plan import RowPlan
from loader_service.plan.token_counts import TokenCounts, has_token_counts, needs_token_counts
from stoker_proto.config import DataConfig


def make_plan(manifest: EntryManifest, data: DataConfig, *, split: str, epoch: int, entry: int) -> LanePlan:
    """The plan of one epoch. Raises DataError."""
    if needs_token_counts(data) and has_token_counts(manifest):
        return RowPlan.make(TokenCounts.of(manifest, data), data, split=split, epoch=epoch, entry=entry)
    return EpochPlan.make(manifest.num_samples, data.order, split=split, epoch=epoch, entry=entry)


def load_plan(
    folder: Path, manifest: EntryManifest, data: DataConfig, *, split: str, epoch: int, entry: int
) -> LanePlan:
    """The plan that was made and saved in the folder."""
    if RowPlan.is_saved(folder, split, epoch, entry):
        counts = TokenCounts.of(manifest, data)
        return RowPlan.load(folder, counts, data, split=split, epoch=epoch, entry=entry)
    return EpochPlan.load(folder, data.order, split=split, epoch=epoch, entry=entry)


def is_saved(folder: Path, split: str, epoch: int, entry: int) -> bool:
    """Whether `load_plan` will find it: `ends` is written last."""
    return plan_file(folder, split, epoch, entry, "ends").exists()
