"""Which rows a step trained: from the run's record and the lanes of the data.

    --step 7  ->  epoch 0, stream positions [96, 104)  ->  rank 1, micro-batch 0: [98, 100)  ->  lane 3, rows 12 and 13

The same functions of `stoker_proto.order` tell a rank which rows to ask for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loader_service.manifest import EntryManifest
from loader_service.plan.lane_plan import LanePlan, PlanKey
from loader_service.plan.plan_files import make_plan
from stoker_proto.config import Config, DataConfig
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.order.lanes import LaneRun, Order
from stoker_proto.order.mixture import MixedOrder
from stoker_proto.order.stream import RunSources, Share
from stoker_proto.run_record import RunRecord, StepLine, read_step

SPLIT = "train"
_PLANS = 32
"""Plans that are kept in memory; others are made again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    """One step of a run, as all its ranks logged it."""

    record: RunRecord
    lines: tuple[StepLine, ...]
    """By rank."""

    @classmethod
    def read(cls, output_dir: Path, step: int) -> RunStep:
        """The newest lines of the step. Raises ConfigError for a step that is not there, DataError for a damaged record.

        The first rank tells which start of the run trained the step last, and so how many ranks did. Lines of other starts, which
        had other settings, do not count.
        """
        first = read_step(output_dir, 0, step)
        record = RunRecord.read(output_dir, first.record)
        lines = [first]
        for rank in range(1, record.world_size):
            line = read_step(output_dir, rank, step)
            if (line.record, line.epoch, line.first_sample) != (first.record, first.epoch, first.first_sample):
                raise DataError(
                    f"step {step}: rank 0 trained it with record {first.record}, rank {rank} with {line.record}: the run ended "
                    "between the two, and the step was not trained by all ranks; name an earlier one"
                )
            lines.append(line)
        return cls(record=record, lines=tuple(lines))

    def check_rank(self, rank: int | None) -> None:
        """Raises ConfigError for a rank that the run did not have."""
        if rank is not None and not 0 <= rank < len(self.lines):
            raise ConfigError(
                f"--rank {rank}: the step was trained by {len(self.lines)} ranks, 0 to {len(self.lines) - 1}"
            )


class Stream:
    """The stream of each epoch of the run, from the manifests of all train entries."""

    def __init__(
        self, config: Config, manifests: Mapping[int, EntryManifest], tokens: Mapping[int, int], record: RunRecord
    ) -> None:
        """tokens: of each entry, where sources are weighed by them; else 0. Raises DataError if the data has other rows than at
        training."""
        self._data, self._manifests = config.data, manifests
        self._sources = _run_sources(config.data)
        self._share = Share(world_size=record.world_size, micro_batch_size=config.trainer.micro_batch_size)
        self.plan = functools.lru_cache(_PLANS)(self._make_plan)
        """(number of the pass, entry) -> its plan."""
        rows = {entry: sum(self.plan(0, entry).lane_lengths()) for entry in manifests}
        self._check(
            record, [sum(rows[n] for n in self._sources.entries_of(s)) for s in range(len(record.pass_samples))]
        )
        self._rates = self._sources.find_rates(rows, tokens)
        self._order = functools.lru_cache(1)(self._make_order)

    def micro_batch(self, line: StepLine, rank: int, index: int) -> list[LaneRun]:
        """The rows of micro-batch `index` of a rank, as runs of lanes: one ticket each."""
        order = self._order(line.epoch)
        return order.runs(*self._share.positions(line.first_sample, rank, index, order.total))

    def lane_of(self, run: LaneRun) -> tuple[int, int]:
        """(entry, its lane)."""
        return divmod(run.lane, self._data.order.lanes)

    def _check(self, record: RunRecord, found: list[int]) -> None:
        if tuple(found) != record.pass_samples:
            raise DataError(
                f"a pass over the data has {found} rows of {', '.join(self._sources.names)}, and had "
                f"{list(record.pass_samples)} at training, so every step has other rows now: give the command the data that the "
                "run trained on (--set data.train_data_paths=...)"
            )

    def _make_order(self, epoch: int) -> MixedOrder:
        return self._sources.mix(self._rates, epoch, self._order_of)

    def _order_of(self, number: int, source: int) -> Order:
        plans = [self.plan(number, entry) for entry in self._sources.entries_of(source)]
        lengths = [length for plan in plans for length in plan.lane_lengths()]
        starts = [start for plan in plans for start in plan.lane_starts()]
        return Order(lengths, self._data.order.cell, starts)

    def _make_plan(self, number: int, entry: int) -> LanePlan:
        return make_plan(self._manifests[entry], self._data, PlanKey(SPLIT, number, entry))


def _run_sources(data: DataConfig) -> RunSources:
    return RunSources(
        names=data.source_names(),
        entries=tuple(f"{data.path_key(SPLIT, n)} ({path})" for n, path in enumerate(data.paths(SPLIT))),
        entry_sources=data.entry_sources(SPLIT),
        weights=data.weights,
        weigh_by=data.weigh_by,
        lanes=data.order.lanes,
        cell=data.order.cell,
    )
