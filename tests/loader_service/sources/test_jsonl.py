"""Lines by byte offset, and the parts that a file is cut into."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loader_service.sources import jsonl
from loader_service.sources.jsonl import cut_lines, iter_lines, line_number, parse_object, read_line
from stoker_proto.errors import DataError


def test_lines_have_offsets_and_are_read_back(tmp_path: Path) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b'{"a":1}\n\n  \n{"b":2}\r\n{"c":3}')
    found = list(iter_lines(shard))
    assert found == [(0, b'{"a":1}'), (12, b'{"b":2}'), (21, b'{"c":3}')]
    assert [read_line(shard, offset, len(line)) for offset, line in found] == [b'{"a":1}', b'{"b":2}', b'{"c":3}']
    assert [line_number(shard, offset) for offset, _ in found] == [1, 4, 5]


def test_parts_of_any_size_hold_every_line_once(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    shard = tmp_path / "a.jsonl"
    lines = [b"x" * int(random.integers(0, 60)) for _ in range(200)]
    for ending in (b"\n", b""):
        shard.write_bytes(b"\n".join(lines) + ending)
        whole = list(iter_lines(shard))
        for part_bytes in (1, 7, 61, 500, 10**6):
            cuts = cut_lines(shard, part_bytes)
            assert cuts[0] == 0
            assert cuts[-1] == shard.stat().st_size
            assert sorted(set(cuts)) == cuts
            parts = [found for a, b in itertools.pairwise(cuts) for found in iter_lines(shard, a, b)]
            assert parts == whole
            content = shard.read_bytes()
            assert all(content[cut - 1 : cut] == b"\n" for cut in cuts[1:-1])


def test_a_part_begins_at_the_first_line_at_or_after_its_size(tmp_path: Path) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b"aa\nbb\ncccc\ndd\n")
    assert cut_lines(shard, 3) == [0, 3, 6, 11, 14]
    assert cut_lines(shard, 4) == [0, 6, 11, 14]
    assert cut_lines(shard, 14) == [0, 14]


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b"{}\n" + b"x" * 1002)
    with pytest.raises(DataError, match=r"a\.jsonl: a line of more than 1000 bytes begins near byte 3"):
        list(iter_lines(shard))


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b"{}\n")
    with pytest.raises(
        DataError, match="it ends before byte 110: it changed since it was scanned; run loader-prepare again"
    ):
        read_line(shard, 100, 10)
    shard.unlink()
    with pytest.raises(DataError, match="the shard cannot be read"):
        read_line(shard, 0, 2)


@pytest.mark.parametrize(
    "line", [b'{"a": ', b"\xff\xfe", b"[" * 100_000, b'{"a": 1} {"b": 2}', b"", b"\xef\xbb\xbf{}", b'{"a": .5}']
)
def test_unreadable_lines_are_named_so(line: bytes) -> None:
    with pytest.raises(DataError, match="unreadable JSON"):
        parse_object(line)


def test_only_objects_are_rows() -> None:
    assert parse_object(b'{"a": [1]}') == {"a": [1]}
    with pytest.raises(DataError, match="a JSON object is expected, not list"):
        parse_object(b"[1]")


@pytest.mark.parametrize("pack", [gzip.compress, lambda data: b"\x28\xb5\x2f\xfd" + data])
def test_a_compressed_file_is_refused_as_such(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """Not line by line, as so many bad records."""
    shard = tmp_path / "train.jsonl"
    shard.write_bytes(pack(b'{"a": 1}\n' * 100))
    with pytest.raises(
        DataError, match=r"train\.jsonl: it is (gzip|zstd)-compressed, and lines are read by their place"
    ):
        cut_lines(shard, 16)
