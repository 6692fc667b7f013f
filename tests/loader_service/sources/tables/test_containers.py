"""The same rows in every container give the same samples, and damaged containers are named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loader_service.sources.base import BaseSFTDataset, Sample
from loader_service.sources.parquet import ParquetReader
from loader_service.sources.tables import parquet
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.errors import ConfigError, DataError

NAMES = ("a.jsonl", "a.ndjson", "a.json", "a.parquet")
MakeTables = Callable[..., TableDataset]
ReadShard = Callable[[BaseSFTDataset, Path], list[Sample]]


def dialogue(number: int) -> dict[str, Any]:
    """A row whose texts have what containers stumble over."""
    texts = ['a "quote" \\ and ] } [ {', "caf\u00e9 \u4f60\u597d\n\r\u2028 line", "tab\t end", "\U0001f525" * 3]
    return {
        "id": str(number),
        "messages": [
            {"role": "user", "content": f"{number}: {texts[number % 4]}"},
            {"role": "assistant", "content": texts[(number + 1) % 4]},
        ],
    }


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", NAMES)
def test_all_containers_give_the_same_samples(
    name: str, packed: str, write_table: Callable[..., Path], make_tables: MakeTables, read_shard: ReadShard
) -> None:
    rows = [dialogue(i) for i in range(13)]
    shard = write_table(name + packed, rows)
    for validate in (False, True):
        samples = read_shard(make_tables("chat", validate=validate), shard)
        assert [[turn.text for turn in sample.turns] for sample in samples] == [
            [message["content"] for message in row["messages"]] for row in rows
        ]


@pytest.mark.parametrize("name", [*NAMES, "unpacked.parquet"])
def test_nan_is_what_is_missing(
    name: str, write_table: Callable[..., Path], make_tables: MakeTables, read_shard: ReadShard
) -> None:
    """As pandas writes it."""
    nan = float("nan")
    unpack = {"unpack_parquet": True} if name.startswith("unpacked") else {}
    for stars, front in ((nan, ""), (float("inf"), ""), (12.0, "<gh_stars>10-100\n")):
        shard = write_table(name, [{"content": "x = 1", "max_stars_count": stars, "max_stars_repo_name": None}] * 3)
        for validate in (False, True):
            code = make_tables("code", repo_metadata=True, validate=validate, **unpack)
            assert [sample.text for sample in read_shard(code, shard)] == [f"{front}x = 1"] * 3
    rows = [{"instruction": "Say hi.", "input": nan, "output": "Hi."}]
    assert [turn.text for turn in read_shard(make_tables("chat", **unpack), write_table(name, rows))[0].turns] == [
        "Say hi.",
        "Hi.",
    ]
    parts = [{"instruction": "a", "output": "b", "history": [["q", nan]]}]
    if name.endswith("json"):
        with pytest.raises(DataError, match=r"field history\[0\]\[1\]: None: a text is expected"):
            read_shard(make_tables("chat"), write_table(name, parts))


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n", b"\xef\xbb\xbf  "])
def test_spaces_around_json_lines_do_no_harm(
    start: bytes, tmp_path: Path, make_tables: MakeTables, read_shard: ReadShard
) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(start + b'{"text": "a"}\n   {"text": "b"}\n\t{"text": "c"} \r\n \n{"text": "d"}  ')
    for validate in (False, True):
        assert [sample.text for sample in read_shard(make_tables("text", validate=validate), shard)] == list("abcd")


@pytest.mark.parametrize("name", NAMES)
def test_records_are_read_in_any_order(name: str, write_table: Callable[..., Path], make_tables: MakeTables) -> None:
    rows = [{"text": f"number {i}"} for i in range(9)]
    shard = write_table(name, rows)
    dataset = make_tables("text")
    records = list(dataset.scan(shard))
    for i in (8, 0, 4, 3, 8):
        (sample,) = dataset.read(shard, records[i].offset, records[i].size)
        assert sample.text == f"number {i}"


def test_a_json_file_may_hold_lines_and_a_jsonl_file_an_array(
    tmp_path: Path, make_tables: MakeTables, read_shard: ReadShard
) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\n')
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf [{"text": "x"},\n{"text": "y"}]')
    for name in ("a.json", "b.jsonl"):
        assert [sample.text for sample in read_shard(make_tables("text"), tmp_path / name)] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"\x1f\x8b\x08\x00", "it is gzip-compressed: call it NAME.gz"),
        ("a.json", b"\x28\xb5\x2f\xfd....", "it is zstd-compressed: call it NAME.zst"),
        ("a.jsonl", b"PAR1....PAR1", "it is parquet: call it NAME.parquet"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("a.jsonl", b"text,label\n", "it begins with 'text,label.n': JSON objects, one per line, or one JSON array"),
        ("a.parquet", b"PAR1 and nothing else", "unreadable parquet"),
        ("a.parquet", b'{"text": "x"}\n', "unreadable parquet"),
        ("a.jsonl.gz", b'{"text": "x"}\n', "damaged gzip data"),
        ("a.jsonl.zst", b'{"text": "x"}\n', "damaged zstd data"),
        (
            "a.csv",
            b"text\n",
            "suffix '.csv': .jsonl, .ndjson, .json, .parquet, .arrow are read, each also with .gz or .zst",
        ),
        ("a.json", b'[{"text": "x"}, {"te', "breaks off at byte 20"),
        ("a.json.gz", gzip.compress(b'[{"text": "x"}, {"te', mtime=0), "breaks off at byte 20"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y', r"a.jsonl:2: a line that begins with '{\"text\": \"y'"),
        ("a.json", b'{\n "text": "x"\n}\n', "a.json:1: a line that begins with '{' and is not one JSON object"),
    ],
)
def test_a_file_that_is_something_else_is_named(
    name: str, content: bytes, message: str, tmp_path: Path, make_tables: MakeTables
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message.replace("(", r"\(")) as caught:
        list(make_tables("text").scan(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("lost", [1, 5, 30])
def test_a_packed_file_that_is_cut_short_is_named(
    packed: str, lost: int, write_table: Callable[..., Path], make_tables: MakeTables
) -> None:
    shard = write_table(f"a.jsonl{packed}", [{"text": f"number {i}"} for i in range(50)])
    shard.write_bytes(shard.read_bytes()[:-lost])
    with pytest.raises(DataError, match=rf"a\.jsonl\{packed}: damaged .* data.*copy it again"):
        list(make_tables("text").scan(shard))
    assert not list(shard.parent.rglob("plain*")), "half of the content must not stay"


def test_a_flipped_bit_in_a_packed_file_is_named(write_table: Callable[..., Path], make_tables: MakeTables) -> None:
    for packed in (".gz", ".zst"):
        shard = write_table(f"a.jsonl{packed}", [{"text": f"number {i}"} for i in range(50)])
        content = bytearray(shard.read_bytes())
        content[-2] ^= 1  # of the length (gzip) or the checksum (zstd)
        shard.write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            list(make_tables("text").scan(shard))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n{"text": "z"}\n', "a.jsonl:3: "),
        ("a.json", b'[{"text": "x"}, {"text": "\xff"}, {"text": "z"}]', "a.json: record 1 (byte 16): "),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n{"text": "z"}\n', "a.jsonl:2: "),
        ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n{"text": "z"}\n', "a.jsonl:2: field text: "),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n{"text": "z"}\n', "a.jsonl:2: field text: "),
        ("a.jsonl", b'{"text": "x"}\n{"text": " "}\n{"text": "z"}\n', "a.jsonl:2: field text: empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text"; "y"}\n{"text": "z"}\n', "a.jsonl:2: unreadable JSON"),
        ("a.json", b'[{"text": "x"}, {"text"; "y"}, {"text": "z"}]', "a.json: record 1 (byte 16): unreadable JSON"),
    ],
)
def test_a_bad_row_is_named_and_keeps_its_place(
    name: str, content: bytes, where: str, tmp_path: Path, make_tables: MakeTables
) -> None:
    shard = tmp_path / name
    shard.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(make_tables("text", validate=True).scan(shard))
    assert str(caught.value).startswith(f"{tmp_path}/{where}")
    dataset = make_tables("text", on_bad_sample="skip", validate=True)
    records = list(dataset.scan(shard))
    assert [record.error is None for record in records] == [True, False, True]
    assert records[1].error == str(caught.value)
    assert [record.num_samples for record in records] == [1, 1, 1]
    with pytest.raises(DataError) as again:
        list(dataset.read(shard, records[1].offset, records[1].size))
    assert str(again.value) == str(caught.value)
    assert [s.text for r in (records[0], records[2]) for s in dataset.read(shard, r.offset, r.size)] == ["x", "z"]


@pytest.mark.parametrize(
    "row",
    [
        b'{"tools": [{"a": %s}], "messages": [%s]}',
        b'{"x": NaN, "tools": [{"a": %s}], "messages": [%s]}',  # no JSON: read by another parser
    ],
)
@pytest.mark.parametrize("validate", [False, True])
def test_a_row_that_is_nested_too_deeply_is_one_bad_row(
    row: bytes, validate: bool, tmp_path: Path, make_tables: MakeTables
) -> None:
    """Parsers take a thousand levels; what walks through them takes fewer."""
    turns = b'{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}'
    shard = tmp_path / "a.jsonl"
    shard.write_bytes(b'{"messages": [%s]}\n' % turns + row % (b"[" * 900 + b"1" + b"]" * 900, turns) + b"\n")
    dataset = make_tables("chat", on_bad_sample="skip", validate=validate)
    good, bad = dataset.scan(shard)
    reason = f"{shard}:2: lists or objects are nested hundreds of levels deep: remove the row"
    assert (good.error, bad.error) == (None, reason if validate else None)
    assert len(list(dataset.read(shard, good.offset, good.size))) == 1
    with pytest.raises(DataError) as caught:
        list(dataset.read(shard, bad.offset, bad.size))
    assert str(caught.value) == reason


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_unpacked_parquet_gives_the_same(
    packed: str, write_table: Callable[..., Path], make_tables: MakeTables, read_shard: ReadShard
) -> None:
    rows = [{**dialogue(i), "images": None, "extra": b"\xff" * 100} for i in range(13)]
    shard = write_table(f"a.parquet{packed}", rows)
    plain = read_shard(make_tables("chat"), shard)
    for validate in (False, True):
        assert read_shard(make_tables("chat", unpack_parquet=True, validate=validate), shard) == plain
    (arrow,) = shard.parent.rglob("arrow-*")
    assert b"\xff" * 100 not in arrow.read_bytes(), "columns that nobody needs are not unpacked"


def test_unpacked_parquet_may_have_categories_that_differ_by_group(
    tmp_path: Path, make_tables: MakeTables, read_shard: ReadShard
) -> None:
    with pq.ParquetWriter(
        tmp_path / "a.parquet", pa.schema([("text", pa.dictionary(pa.int32(), pa.string()))])
    ) as writer:
        for texts in (["x", "y"], ["z", "x"]):
            writer.write_table(pa.table({"text": pa.array(texts).dictionary_encode()}))
    samples = read_shard(make_tables("text", unpack_parquet=True), tmp_path / "a.parquet")
    assert [sample.text for sample in samples] == ["x", "y", "z", "x"]


def test_parquet_without_a_row_is_named(tmp_path: Path, make_tables: MakeTables) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: a parquet file without a row"):
        list(make_tables("text", unpack_parquet=True).scan(tmp_path / "a.parquet"))


def test_text_of_parquet_that_is_no_utf8_is_one_bad_row(tmp_path: Path, make_tables: MakeTables) -> None:
    raw = pa.array([b"x", b"\xff\xfe", b"z"])
    column = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    dataset = make_tables("text", on_bad_sample="skip", validate=True)
    records = list(dataset.scan(tmp_path / "a.parquet"))
    assert [record.error is None for record in records] == [True, False, True]
    assert "a.parquet: record row 1: unreadable parquet (UnicodeDecodeError" in str(records[1].error)


def test_parquet_without_the_column_names_those_there_are(
    write_table: Callable[..., Path], make_tables: MakeTables
) -> None:
    shard = write_table("a.parquet", [{"body": "x", "size": 1}])
    with pytest.raises(DataError, match=r"a\.parquet: field text: it is not there; there are body, size: name"):
        list(make_tables("text").scan(shard))


def test_decoded_row_groups_are_kept_and_bounded(
    tmp_path: Path, make_tables: MakeTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": f"{i:04d}" * 100, "other": "y" * 1000} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=10)
    reader = ParquetReader(10_000)  # two groups of one column of 4,000 bytes
    monkeypatch.setattr(parquet, "_reader", reader)
    dataset = make_tables("text")
    for number in (0, 15, 3, 25, 39, 0):
        (sample,) = dataset.read(tmp_path / "a.parquet", number, 1)
        assert sample.text == rows[number]["text"]
        assert reader._size_bytes == sum(group.nbytes for group in reader._groups.values()) <= 10_000
    assert [key[2] for key in reader._groups] == [3, 0]
    assert all(group.column_names == ["text"] for group in reader._groups.values())
    monkeypatch.setattr(parquet, "_reader", ParquetReader(10_000, max_group_bytes=100))
    with pytest.raises(DataError, match=r"row group 1 has .* write the file with smaller row groups"):
        list(dataset.read(tmp_path / "a.parquet", 10, 1))


def test_formats_are_not_mixed_in_one_entry(tmp_path: Path, make_tables: MakeTables) -> None:
    dataset = make_tables("text")

    def locate(*names: str) -> int:
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
        return len(dataset.locate(str(folder)).paths)

    assert locate("a.jsonl", "b.json", "c.ndjson.gz") == 3
    assert locate("a.txt", "b.md") == 2
    with pytest.raises(ConfigError, match=r"files of different formats \(a\.jsonl, b\.parquet\) are named together"):
        locate("a.jsonl", "b.parquet")
    with pytest.raises(ConfigError, match=r"a\.jsonl\.gz and a\.jsonl are named together, and would be read twice"):
        locate("a.jsonl", "a.jsonl.gz")


def test_a_shard_that_is_written_anew_is_seen(tmp_path: Path, make_tables: MakeTables) -> None:
    dataset, shard = make_tables("text"), tmp_path / "a.json"
    for container in ([{"text": "x"}], {"text": "longer"}):
        shard.write_text(json.dumps(container))
        (record,) = dataset.scan(shard)
        (sample,) = dataset.read(shard, record.offset, record.size)
    assert sample.text == "longer"
