"""Which kind of plan an entry has. The server makes and saves plans; the workers load them."""

from __future__ import annotations

from pathlib import Path

from loader_service.manifest import EntryManifest
from loader_service.plan.lane_plan import LanePlan, PlanKey, plan_file
from loader_service.plan.record_plan import RecordPlan
from loader_service.plan.row_plan import RowPlan
from loader_service.plan.token_counts import TokenCounts, has_token_counts, needs_token_counts
from stoker_proto.config import DataConfig


def make_plan(manifest: EntryManifest, data: DataConfig, key: PlanKey) -> LanePlan:
    """The plan of one epoch. Raises DataError."""
    if needs_token_counts(data) and has_token_counts(manifest):
        return RowPlan.make(TokenCounts.of(manifest, data), data, key)
    return RecordPlan.make(manifest.num_samples, data.order, key)


def load_plan(folder: Path, manifest: EntryManifest, data: DataConfig, key: PlanKey) -> LanePlan:
    """The plan that was saved in the folder."""
    if RowPlan.exists(folder, key):
        counts = TokenCounts.of(manifest, data)
        return RowPlan.load(folder, counts, data, key)
    return RecordPlan.load(folder, data.order, key)


def plan_exists(folder: Path, key: PlanKey) -> bool:
    """Whether `load_plan` finds the plan. Its array `ends` is written last."""
    return plan_file(folder, key, "ends").exists()
