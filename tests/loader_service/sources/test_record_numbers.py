"""Bad records are named by their number, and naming many of them does not read their file again and again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from loader_service.sources.base import make_dataset
from loader_service.sources.jsonl import line_number
from loader_service.sources.tables.json_table import JsonArray
from stoker_proto.config import DataConfig

NUM_ROWS = 6000
EVERY = 30  # one row of so many is bad
MIB = 1 << 20


def read_bytes() -> int:
    """Bytes that this process has read so far, as the kernel counts them."""
    return int(Path("/proc/self/io").read_text().split()[1])


def rows() -> list[bytes]:
    padding = "x" * 1300
    good = {"messages": [{"role": "user", "content": padding}, {"role": "assistant", "content": '[}\\"'}]}
    bad = {"messages": [{"role": "user", "content": padding}, {"role": "nobody", "content": "a"}]}
    return [json.dumps(bad if number % EVERY == EVERY - 1 else good).encode() for number in range(NUM_ROWS)]


@pytest.mark.long
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_naming_bad_rows_reads_their_file_a_few_times(name: str, tmp_path: Path) -> None:
    shard = tmp_path / name
    is_array = name == "a.json"
    shard.write_bytes(b"[" + b",\n".join(rows()) + b"]" if is_array else b"\n".join(rows()))
    size = shard.stat().st_size
    assert size > 7 * MIB
    data = DataConfig(
        train_data_paths=(str(shard),),
        dataset_type="chat",
        on_bad_sample="skip",
        options={"validate": True},
        cache_dir=str(tmp_path),
        max_seq_len=1024,
    )
    dataset = make_dataset(data)
    before = read_bytes()
    errors = [record.error for record in dataset.scan(shard) if record.error is not None]
    scanned = read_bytes() - before
    assert len(errors) == 200  # 200 times half of the file would be 750 MiB
    assert scanned < 5 * size
    expected = [n + (0 if is_array else 1) for n in range(EVERY - 1, NUM_ROWS, EVERY)]
    shown = [f"{shard}: record {n} (byte " if is_array else f"{shard}:{n}: " for n in expected]
    assert [error[: len(start)] for error, start in zip(errors, shown, strict=True)] == shown


@pytest.mark.long
def test_records_in_any_order_cost_a_mib_each(tmp_path: Path) -> None:
    """As loaders meet them: from a mark to the record."""
    random.seed(5)
    lines = rows()
    offsets = [sum(map(len, lines[:n])) + 2 * n + 1 for n in range(0, NUM_ROWS, 25)]
    array, text = tmp_path / "a.json", tmp_path / "a.jsonl"
    array.write_bytes(b"[" + b",\n".join(lines) + b"]")
    text.write_bytes(b"\n\n".join(lines))
    numbers = list(range(len(offsets)))
    random.shuffle(numbers)
    before = read_bytes()
    for n in numbers:
        assert line_number(text, offsets[n] - 1) == 1 + 2 * 25 * n
    assert read_bytes() - before < text.stat().st_size + 240 * MIB  # 240 times half of the file would be 900 MiB
    before = read_bytes()
    for n in numbers:
        assert JsonArray(array).where(offsets[n]) == ("", f"{25 * n} (byte {offsets[n]})")
    assert read_bytes() - before < array.stat().st_size + 2 * 240 * MIB


def test_a_file_that_was_written_again_is_counted_again(tmp_path: Path) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b"a\nb\nc\n")
    assert line_number(shard, 4) == 3
    shard.write_bytes(b"aaa\nb\nc\nd")
    assert line_number(shard, 4) == 2
