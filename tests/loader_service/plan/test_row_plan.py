"""Packed rows and rows of similar length: how full, in which order, and each sample once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader_service.pieces.read_ahead import LaneKey, ReadAhead
from loader_service.plan import plan_files as plans
from loader_service.plan.lane_plan import LanePlan, PlanKey, SampleRef
from loader_service.plan.record_plan import RecordPlan
from loader_service.plan.row_plan import RowPlan
from loader_service.plan.token_counts import TokenCounts, check_token_counts
from stoker_proto.config import DataConfig, OrderConfig, SourceConfig
from stoker_proto.errors import ConfigError, LocalProtocolError, ManifestError
from stoker_proto.order.lanes import Order

MAX = 2048
TOKENS = st.lists(st.integers(0, 100), min_size=1, max_size=80)
ORDERS = st.builds(
    OrderConfig,
    lanes=st.integers(1, 5),
    window_rows=st.integers(1, 6),
    cell=st.integers(1, 4),
    seed=st.integers(0, 2),
)


def make_data(order: OrderConfig | None = None, *, max_seq_len: int = MAX, **keys: Any) -> DataConfig:
    return DataConfig(
        dataset_type="x", train_data_paths=("x",), max_seq_len=max_seq_len, order=order or OrderConfig(), **keys
    )


def text_counts(tokens: list[int] | np.ndarray, data: DataConfig) -> TokenCounts:
    """Records of plain text, cut into segments; one without tokens has no sample."""
    num_tokens = np.asarray(tokens, np.int64)
    num_samples = (-(-num_tokens // data.max_seq_len)).astype(np.uint32)
    return TokenCounts(num_samples=num_samples, num_tokens=num_tokens.astype(np.uint32), max_seq_len=data.max_seq_len)


def divided_counts(records: list[list[int]], data: DataConfig) -> TokenCounts:
    """Records of dialogues that a chat template divides: rows of any lengths."""
    num_samples = np.array([len(lengths) for lengths in records], np.uint32)
    return TokenCounts(
        num_samples=num_samples,
        num_tokens=np.array([sum(lengths) for lengths in records], np.uint32),
        max_seq_len=data.max_seq_len,
        row_starts=np.cumsum(num_samples, dtype=np.int64) - num_samples,
        row_tokens=np.array([length for lengths in records for length in lengths], np.uint32),
    )


def make_plan(counts: TokenCounts, data: DataConfig, epoch: int = 0, split: str = "train") -> RowPlan:
    return RowPlan.make(counts, data, PlanKey(split, epoch, 0))


def all_rows(plan: RowPlan) -> list[list[list[SampleRef]]]:
    """Lane -> rows -> samples."""
    lanes = []
    for lane, length in enumerate(plan.lane_lengths()):
        rows = plan.rows(lane, 0, length)
        ends = np.cumsum(rows.row_samples if rows.row_samples is not None else [1] * length).tolist()
        samples = [SampleRef(*pair) for pair in rows.samples]
        lanes.append([samples[a:b] for a, b in zip([0, *ends], ends, strict=False)])
    return lanes


def length_of(plan: RowPlan, row: list[SampleRef]) -> int:
    return sum(plan.counts.of_record(ref.record)[ref.sample] for ref in row)


@settings(deadline=None)
@given(TOKENS, ORDERS, st.booleans(), st.integers(0, 2))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(
    tokens: list[int], order: OrderConfig, packing: bool, epoch: int
) -> None:
    data = make_data(order, max_seq_len=24, packing=packing, group_by_length=not packing)
    plan = make_plan(text_counts(tokens, data), data, epoch)
    rows = [row for lane in all_rows(plan) for row in lane]
    seen = sorted(ref for row in rows for ref in row)
    assert seen == [(record, sample) for record, count in enumerate(tokens) for sample in range(-(-count // 24))]
    assert all(row and length_of(plan, row) <= 24 for row in rows)
    assert sum(length_of(plan, row) for row in rows) == sum(tokens)
    assert packing or all(len(row) == 1 for row in rows)


@settings(deadline=None)
@given(TOKENS, ORDERS, st.booleans(), st.data())
def test_any_part_of_a_lane_is_a_part_of_the_whole(
    tokens: list[int], order: OrderConfig, packing: bool, draw: st.DataObject
) -> None:
    data = make_data(order, max_seq_len=24, packing=packing, group_by_length=not packing)
    counts = text_counts(tokens, data)
    plan = make_plan(counts, data)
    lane = draw.draw(st.integers(0, order.lanes - 1))
    length = plan.lane_length(lane)
    start = draw.draw(st.integers(0, length))
    count = draw.draw(st.integers(0, length - start))
    part = make_plan(counts, data).rows(lane, start, count)  # no layout cached by the first read
    whole = all_rows(plan)[lane][start : start + count]
    assert part.samples == [ref for row in whole for ref in row]
    assert (part.row_samples or [1] * len(part.samples)) == [len(row) for row in whole]


@settings(deadline=None)
@given(TOKENS, ORDERS, st.booleans())
def test_records_are_first_used_where_the_windows_say(tokens: list[int], order: OrderConfig, packing: bool) -> None:
    """Reading ahead gives every record of a lane, each once, by the row that needs it first."""
    data = make_data(order, max_seq_len=24, packing=packing, group_by_length=not packing)
    plan = make_plan(text_counts(tokens, data), data)
    lanes = all_rows(plan)
    for lane, rows in enumerate(lanes):
        first: dict[int, int] = {}
        for place, row in enumerate(rows):
            for ref in row:
                first.setdefault(ref.record, place)
        ahead, found = ReadAhead(), []
        if rows:
            ahead.asked(LaneKey("train", 0, 0, lane), plan, len(rows), len(rows))
            plan.window_at(lane, 0)
            position = 0
            while position < len(rows):
                window = plan.window_at(lane, position)
                uses = dict(zip(window.records.tolist(), window.first_use.tolist(), strict=True))
                for record, use in uses.items():
                    assert first.get(record, window.stop) == use
                position = window.stop
            fresh = ReadAhead()
            fresh.asked(LaneKey("train", 0, 0, lane), plan, len(rows), 1)
            for stop in range(1, len(rows) + 1):
                fresh.asked(LaneKey("train", 0, 0, lane), plan, len(rows), stop)
                while (key := fresh.pop()) is not None:
                    found.append(key.record)
            assert sorted(found) == sorted(first)


@pytest.mark.long
@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 24), max_size=5), min_size=1, max_size=40),
    ORDERS,
    st.booleans(),
    st.integers(0, 2),
)
def test_rows_of_divided_dialogues_are_packed_by_their_own_lengths(
    records: list[list[int]], order: OrderConfig, packing: bool, epoch: int
) -> None:
    data = make_data(order, max_seq_len=24, packing=packing, group_by_length=not packing)
    plan = make_plan(divided_counts(records, data), data, epoch)
    rows = [row for lane in all_rows(plan) for row in lane]
    seen = sorted(ref for row in rows for ref in row)
    assert seen == [(record, sample) for record, lengths in enumerate(records) for sample in range(len(lengths))]
    assert all(row and sum(records[ref.record][ref.sample] for ref in row) <= 24 for row in rows)
    assert packing or all(len(row) == 1 for row in rows)


def test_rows_of_divided_dialogues_share_rows() -> None:
    data = make_data(OrderConfig(lanes=1), max_seq_len=8, packing=True)
    plan = make_plan(divided_counts([[1, 2, 3], [4, 2], [4]], data), data)
    assert plan.lane_lengths() == [2]


def lognormal(count: int, mean: float, seed: int) -> np.ndarray:
    lengths = np.random.default_rng(seed).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.maximum(lengths, 1).astype(np.uint32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("records", [100, 300, 1000, 10_000])
@pytest.mark.parametrize("kind", ["chats", "code"])
def test_rows_are_full(kind: str, records: int, seed: int) -> None:
    """97% of all tokens of all rows but the last one that a small data set leaves; with the default config."""
    data = make_data(packing=True)
    counts = text_counts(lognormal(records, 1500, seed), data)
    if kind == "chats":  # one sample each, cut where it is too long
        counts = replace(counts, num_samples=np.ones(records, np.uint32), num_tokens=lognormal(records, 300, seed))
    plan = make_plan(counts, data)
    rows = sum(plan.lane_lengths())
    tokens = int(counts.lengths(plan.records).sum(dtype=np.int64))
    if records <= 1000:
        rows -= 1
    assert tokens / (rows * MAX) >= 0.97, (rows, tokens)
    assert rows >= tokens // MAX


def test_plans_repeat_and_epochs_seeds_and_entries_differ() -> None:
    data = make_data(OrderConfig(lanes=4, window_rows=4), max_seq_len=64, packing=True)
    counts = text_counts(lognormal(200, 40, 0), data)

    def rows(epoch: int = 0, seed: int = 0, entry: int = 0, split: str = "train") -> list[list[list[SampleRef]]]:
        config = replace(data, order=replace(data.order, seed=seed))
        return all_rows(RowPlan.make(counts, config, PlanKey(split, epoch, entry)))

    assert rows() == rows()
    others = [rows(epoch=1), rows(seed=1), rows(entry=1), rows(split="val")]
    assert all(other != rows() for other in others)
    assert rows(split="val") == rows(split="val", epoch=1)

    def companions(lanes: list[list[list[SampleRef]]]) -> set[frozenset[SampleRef]]:
        return {frozenset(row) for lane in lanes for row in lane if len(row) > 1}

    assert len(companions(rows()) & companions(rows(epoch=1))) < 3  # other samples share a row in another epoch


def test_the_order_is_pinned() -> None:
    """Another order under the same fingerprint would silently mix loaders of two versions: raise PLAN_VERSION instead."""
    data = make_data(OrderConfig(lanes=2, window_rows=2), max_seq_len=8, packing=True)
    rows = all_rows(make_plan(text_counts([5, 3, 20, 6, 2, 7], data), data))
    assert [[[tuple(ref) for ref in row] for row in lane] for lane in rows] == PACKED
    data = make_data(OrderConfig(lanes=2, window_rows=4, cell=2), max_seq_len=8, group_by_length=True)
    rows = all_rows(make_plan(text_counts([5, 3, 20, 6, 2, 7], data), data))
    assert [[tuple(ref) for row in lane for ref in row] for lane in rows] == GROUPED


PACKED = [[[(2, 1)], [(2, 0)], [(5, 0)], [(2, 2), (1, 0)]], [[(0, 0)], [(4, 0), (3, 0)]]]
GROUPED = [[(2, 2), (5, 0), (2, 0), (2, 1), (1, 0)], [(0, 0), (3, 0), (4, 0)]]


def test_a_saved_plan_is_mapped_and_equal(tmp_path: Path) -> None:
    for number, keys in enumerate(({"packing": True}, {"group_by_length": True})):
        data = make_data(OrderConfig(lanes=3, window_rows=3), max_seq_len=64, **keys)
        counts = text_counts(lognormal(100, 60, 1), data)
        plan = make_plan(counts, data, epoch=number)
        plan.save(tmp_path)
        loaded = RowPlan.load(tmp_path, counts, data, PlanKey("train", number, 0))
        assert isinstance(loaded.records.base, np.memmap)
        assert all_rows(loaded) == all_rows(plan)
        assert loaded.lane_starts() == plan.lane_starts()
        divided = divided_counts([[20, 30], [5], [], [60, 1, 2]], data)
        plan = make_plan(divided, data, epoch=number + 2)
        plan.save(tmp_path)
        loaded = RowPlan.load(tmp_path, divided, data, PlanKey("train", number + 2, 0))
        assert all_rows(loaded) == all_rows(plan)


def test_a_small_set_has_one_lane_and_the_others_are_empty() -> None:
    data = make_data(packing=True)
    plan = make_plan(text_counts(lognormal(100, 300, 0), data), data)
    assert [lane for lane, length in enumerate(plan.lane_lengths()) if length] == [0]
    assert Order(plan.lane_lengths(), 8, plan.lane_starts()).total == plan.lane_length(0)
    with pytest.raises(LocalProtocolError, match="lane 3 of entry 0 has no row 0"):
        plan.rows(3, 0, 1)
    empty = make_plan(text_counts([], data), data)
    assert set(empty.lane_lengths()) == set(empty.lane_starts()) == {0}


def test_cells_hold_rows_of_similar_length() -> None:
    data = make_data(OrderConfig(lanes=4, cell=8), group_by_length=True)
    counts = text_counts(lognormal(4000, 300, 0), data)
    plain = replace(data, order=replace(data.order, window_rows=8))  # windows of one cell: nothing to choose from

    def padding(config: DataConfig) -> float:
        """Share of the tokens of all batches of one cell that is padding."""
        plan = make_plan(counts, config, epoch=1)
        lengths = [[length_of(plan, row) for row in lane] for lane in all_rows(plan)]
        cells = [lane[i : i + 8] for lane in lengths for i in range(0, len(lane), 8)]
        return 1 - sum(map(sum, cells)) / sum(max(cell) * len(cell) for cell in cells)

    assert padding(plain) > 0.5
    assert padding(data) < 0.22
    first = [length_of(make_plan(counts, data), row) for row in all_rows(make_plan(counts, data))[0][:128]]
    cells = [np.mean(first[i : i + 8]) for i in range(0, 128, 8)]
    assert sorted(cells) != cells != sorted(cells, reverse=True)  # which cell comes when is chance


@dataclass(frozen=True)
class Entry:
    """What of a manifest is checked."""

    num_samples: np.ndarray
    num_tokens: np.ndarray
    num_bad: int = 0
    statistics: object = None
    path: str = "chats.jsonl"
    row_starts: np.ndarray | None = None
    row_tokens: np.ndarray | None = None

    @property
    def num_records(self) -> int:
        return len(self.num_samples)


def entry(samples: list[int], tokens: list[int], **keys: Any) -> Any:
    return Entry(np.array(samples, np.uint32), np.array(tokens, np.uint32), **keys)


@pytest.mark.parametrize(
    ("manifest", "kind", "message"),
    [
        (entry([1], [5], statistics=1), ConfigError, r"data\.packing is for text, and here is none \(chats\.jsonl: it holds"),
        (entry([1, 1, 0], [5, 0, 0]), ConfigError, r"1 of its 3 records have no count of tokens: .* \(x\) must set is_text"),
        (entry([2], [2048]), ManifestError, r"record 0, field num_tokens: 2048 tokens in 2 samples"),
        (entry([1, 2], [9, 4097]), ManifestError, "record 1, field num_tokens: 4097 tokens in 2 samples"),
    ],
)  # fmt: skip
def test_entries_that_cannot_be_packed(manifest: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_token_counts({"train": {0: manifest}, "val": {}}, make_data(packing=True))
    check_token_counts({"train": {0: manifest}, "val": {}}, make_data())


def test_beside_text_actions_keep_one_sample_a_row(caplog: pytest.LogCaptureFixture) -> None:
    data = make_data(packing=True, sources=(SourceConfig(dataset_type="x", paths=("a", "b", "c")),))
    chats, robots, uncounted = entry([1], [5]), entry([9], [0], statistics=1), entry([1], [0], path="c.jsonl")
    check_token_counts({"train": {0: chats, 1: robots, 2: uncounted}}, data)
    check_token_counts({"train": {1: robots}}, data)  # another loader holds the text
    assert [type(make_plan_of(e, data)) for e in (chats, robots, uncounted)] == [RowPlan, RecordPlan, RecordPlan]
    assert "data.packing does not apply to c.jsonl: 1 of its 1 records have no count" in caplog.text
    assert "actions" not in caplog.text  # as is to be expected


def make_plan_of(manifest: Any, data: DataConfig) -> LanePlan:
    return plans.make_plan(manifest, data, PlanKey("train", 0, 0))


def test_what_the_scan_found_bad_has_the_length_of_its_filler() -> None:
    manifest = entry([1, 2, 1], [9000, 4096, 0], num_bad=1)
    data = make_data(packing=True)
    check_token_counts({"train": {0: manifest}}, data)
    counts = TokenCounts.of(manifest, data)
    assert [counts.of_record(record) for record in range(3)] == [[2048], [2048, 2048], [1]]
    assert counts.lengths(np.array([2, 0, 1], np.uint32)).tolist() == [1, 2048, 2048, 2048]
