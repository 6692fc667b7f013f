"""Rows of an entry, made by the same plan and encoder that answer tickets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loader_service.manifest import EntryManifest
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.piece import EncodedRecord, EncodedSample
from loader_service.plan.lane_plan import LanePlan, PlanKey, SampleRef
from loader_service.plan.plan_files import make_plan
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True)
class InspectedSample:
    """One sample, or why it is bad (policy `skip`)."""

    ref: SampleRef
    shard: Path
    offset: int
    size: int
    """Of the record, as the scan found it."""
    encoded: EncodedSample | None
    error: str | None


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """One row of training; several samples where text is packed."""

    manifest: EntryManifest
    place: str
    """Its place in the epoch: `lane 3, row 0 of 41`."""
    samples: tuple[InspectedSample, ...]


def first_rows(
    manifest: EntryManifest, encoder: RecordEncoder, data: DataConfig, *, epoch: int, count: int
) -> Iterator[InspectedRow]:
    """The first row of every lane, then the second of every lane, and so on. Raises DataError under policy `fail`."""
    plan = make_plan(manifest, data, PlanKey(manifest.split, epoch, manifest.entry))
    for lane, position in _places(plan, count):
        rows = plan.rows(lane, position, 1)
        yield InspectedRow(
            manifest,
            f"lane {lane}, row {position} of {plan.lane_length(lane)}",
            tuple(_inspect(manifest, encoder, [SampleRef(*pair) for pair in rows.samples], epoch)),
        )


def rows_of_record(
    manifest: EntryManifest, encoder: RecordEncoder, record: int, *, epoch: int, count: int
) -> Iterator[InspectedRow]:
    """The first samples of one record, each as a row. Raises ConfigError where there is no such record."""
    if not 0 <= record < manifest.num_records:
        raise ConfigError(f"--record {record}: {manifest.path} has records 0 to {manifest.num_records - 1}")
    refs = [SampleRef(record, sample) for sample in range(min(count, int(manifest.num_samples[record])))]
    for ref, sample in zip(refs, _inspect(manifest, encoder, refs, epoch), strict=True):
        yield InspectedRow(manifest, f"sample {ref.sample} of {manifest.num_samples[record]}", (sample,))


def _places(plan: LanePlan, count: int) -> Iterator[tuple[int, int]]:
    lengths = plan.lane_lengths()
    for position in range(max(lengths, default=0)):
        for lane in [lane for lane, length in enumerate(lengths) if length > position]:
            if count == 0:
                return
            count -= 1
            yield lane, position


def _inspect(
    manifest: EntryManifest, encoder: RecordEncoder, refs: Sequence[SampleRef], epoch: int
) -> Iterator[InspectedSample]:
    records: dict[int, EncodedRecord] = {}
    for ref in refs:
        if ref.record not in records:
            records[ref.record] = encoder.encode(manifest, ref.record, epoch)
        record = records[ref.record]
        yield InspectedSample(
            ref,
            *manifest.place(ref.record),
            None if record.error is not None else record.samples[ref.sample],
            record.error,
        )
