"""Texts of tables and of text files, and token ids of tables and of token files."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.sources.base import BaseSFTDataset, Sample
from loader_service.sources.tables import plain_text
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.errors import ConfigError, DataError

MakeTables = Callable[..., TableDataset]
ReadShard = Callable[[BaseSFTDataset, Path], list[Sample]]

STORY = "One,\ntwo.\n\nThree:\r\nfour.\r\n\r\n \t \n\n  Five\u00e9  \n \nSix"


def tokens_of(samples: list[Sample]) -> list[list[int]]:
    found = [sample.input_ids for sample in samples]
    assert all(ids is not None and ids.dtype == np.int32 and ids.ndim == 1 for ids in found)
    return [ids.tolist() for ids in found if ids is not None]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
@pytest.mark.parametrize(
    ("split", "texts"),
    [
        ("file", [STORY]),
        ("lines", ["One,", "two.", "Three:", "four.", "  Five\u00e9  ", "Six"]),
        ("paragraphs", ["One,\ntwo.", "Three:\r\nfour.", "  Five\u00e9  ", "Six"]),
    ],
)
def test_text_files_are_split(
    name: str, split: str, texts: list[str], tmp_path: Path, make_tables: MakeTables, read_shard: ReadShard
) -> None:
    content = STORY.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    for validate in (False, True):
        dataset = make_tables("text", split=split, validate=validate)
        assert [sample.text for sample in read_shard(dataset, tmp_path / name)] == texts


def test_paragraphs_are_told_apart_however_far(
    tmp_path: Path, make_tables: MakeTables, read_shard: ReadShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_text, "_LONG_GAP", 4)
    (tmp_path / "a.txt").write_text("a\nb\n" + " " * 50 + "\nc\n\nd\n\n\n")
    samples = read_shard(make_tables("text", split="paragraphs"), tmp_path / "a.txt")
    assert [sample.text for sample in samples] == ["a\nb", "c", "d"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path, make_tables: MakeTables, read_shard: ReadShard) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    for split, first in (("file", "one\ntwo\n"), ("lines", "one"), ("paragraphs", "one\ntwo")):
        assert read_shard(make_tables("text", split=split), tmp_path / "a.txt")[0].text == first
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf\r\n\r\none\ntwo\n")
    for split, texts in (("lines", ["one", "two"]), ("paragraphs", ["one\ntwo"])):
        samples = read_shard(make_tables("text", split=split), tmp_path / "b.txt")
        assert [sample.text for sample in samples] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\n\ntwo \xff\n", r"a\.txt:3: byte 9 is no UTF-8"),
        ("one\n\ntwo".encode("utf-16"), r"a\.txt:1: byte 0 is no"),
    ],
)
def test_text_that_is_no_utf8_is_named(content: bytes, message: str, tmp_path: Path, make_tables: MakeTables) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(make_tables("text", split="lines", validate=True).scan(tmp_path / "a.txt"))


def test_a_text_file_that_is_too_large_is_no_record(
    tmp_path: Path, make_tables: MakeTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_text, "MAX_LINE_BYTES", 5)
    (tmp_path / "a.txt").write_text("onetwo\n")
    with pytest.raises(DataError, match=r"a\.txt: a text of 7 bytes at byte 0: at most 5 .* data\.options\.split"):
        list(make_tables("text").scan(tmp_path / "a.txt"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.zst"])
def test_lists_of_a_column_are_token_ids(
    name: str, write_table: Callable[..., Path], make_tables: MakeTables, read_shard: ReadShard
) -> None:
    shard = write_table(name, [{"input_ids": [1, 2, 70000]}, {"input_ids": [5]}])
    assert tokens_of(read_shard(make_tables("text", column="input_ids"), shard)) == [[1, 2, 70000], [5]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "empty"),
        ([1, -2], "token ids from -2 to 1: 0 to 2147483647 are possible"),
        ([1 << 31], "token ids from 2147483648"),
        ([1, 2.5], "something else than whole numbers"),
        ([True], "something else than whole numbers"),
        (["a"], "something else than whole numbers"),
    ],
)
def test_lists_that_are_no_token_ids_are_named(
    value: list[Any], message: str, write_table: Callable[..., Path], make_tables: MakeTables
) -> None:
    shard = write_table("a.jsonl", [{"ids": value}])
    with pytest.raises(DataError, match=rf"a\.jsonl:1: field ids: .*{message}"):
        list(make_tables("text", column="ids", validate=True).scan(shard))


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_token_files_are_cut_into_rows(
    dtype: str, tmp_path: Path, make_tables: MakeTables, read_shard: ReadShard
) -> None:
    ids = np.arange(10, dtype=dtype) * 6000
    ids.tofile(tmp_path / "train.bin")
    np.save(tmp_path / "train.npy", ids)
    (tmp_path / "train.bin.gz").write_bytes(gzip.compress(ids.tobytes()))
    expected = [ids[:4].tolist(), ids[4:8].tolist(), ids[8:].tolist()]
    for name in ("train.bin", "train.npy", "train.bin.gz"):
        dataset = make_tables("text", dtype=dtype, record_tokens=4)
        assert tokens_of(read_shard(dataset, tmp_path / name)) == expected


@pytest.mark.parametrize("dtype", ["uint32", "int64"])
def test_wide_ids_are_not_read_as_uint16_by_default(dtype: str, tmp_path: Path, make_tables: MakeTables) -> None:
    ids = np.random.default_rng(0).integers(0, 151_000, 300)
    ids.astype(dtype).tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin: every second .* set data\.options\.dtype to uint32 or int64, or"):
        list(make_tables("text", record_tokens=4).scan(tmp_path / "train.bin"))
    assert len(list(make_tables("text", record_tokens=4, dtype=dtype).scan(tmp_path / "train.bin"))) == 75
    assert list(make_tables("text", record_tokens=4, dtype="uint16").scan(tmp_path / "train.bin"))  # as it was said
    (ids % 50_000).astype(np.uint16).tofile(tmp_path / "narrow.bin")
    np.zeros(300, np.uint16).tofile(tmp_path / "zeros.bin")
    for name in ("narrow.bin", "zeros.bin"):
        assert len(list(make_tables("text", record_tokens=4).scan(tmp_path / name))) == 75


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.bin", b"123", {}, r"a\.bin: 3 bytes are no whole number of uint16: correct data\.options\.dtype"),
        ("a.npy", np.zeros((2, 2), np.uint16), {}, r"a\.npy: uint16\[2, 2\]: a one-dimensional array of integers"),
        ("a.npy", np.zeros(3, np.float32), {}, r"a\.npy: float32\[3\]: a one-dimensional array of integers"),
        ("a.npy", b"no header", {}, r"a\.npy: "),
        ("a.npy", np.array([{}], object), {}, r"a\.npy: "),
        (
            "a.bin",
            np.full(4, -1, np.int32).tobytes(),
            {"dtype": "int32"},
            r"a\.bin: record 0 \(byte 0\), .*from -1 to -1",
        ),
    ],
)
def test_what_is_no_token_file_is_named(
    name: str, content: Any, options: dict[str, Any], message: str, tmp_path: Path, make_tables: MakeTables
) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        list(make_tables("text", record_tokens=2, validate=True, **options).scan(tmp_path / name))


def test_a_token_file_that_is_cut_short_is_named(tmp_path: Path, make_tables: MakeTables) -> None:
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"a\.npy: its header promises 100 numbers, and it has 198 bytes"):
        list(make_tables("text", record_tokens=2).scan(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"a\.bin: data\.options\.record_tokens is not set; say how many tokens of a \.bin file are one record"),
        ({"record_tokens": 65}, r"data\.options\.record_tokens is 65: from 2 to data\.max_seq_len \(64\)"),
        ({"record_tokens": 1}, r"data\.options\.record_tokens is 1"),
        ({"record_tokens": 4, "dtype": "float32"}, r"data\.options\.dtype is 'float32': choose one of uint16, uint32"),
        ({"split": "words"}, r"data\.options\.split is 'words': choose one of file, lines, paragraphs"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], message: str, tmp_path: Path, make_tables: MakeTables
) -> None:
    (tmp_path / "a.bin").write_bytes(b"1234")
    with pytest.raises(ConfigError, match=message):
        list(make_tables("text", **options).scan(tmp_path / "a.bin"))
