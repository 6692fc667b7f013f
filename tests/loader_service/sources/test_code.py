"""Files of code: filters, metadata in front, filling in the middle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loader_service.sources.base import BaseSFTDataset, Sample
from loader_service.sources.code import FimTokens, fill_in_the_middle, star_bucket
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.errors import ConfigError, DataError

MakeTables = Callable[..., TableDataset]
ReadShard = Callable[[BaseSFTDataset, Path], list[Sample]]
STARCODER = FimTokens("<fim_prefix>", "<fim_middle>", "<fim_suffix>")


def stack_row(name: str, content: str, licences: list[str] | None, stars: int | None = 12) -> dict[str, Any]:
    """A row as the-stack-dedup has them."""
    return {
        "content": content,
        "lang": {"py": "Python", "rs": "Rust"}[name.rpartition(".")[2]],
        "ext": name.rpartition(".")[2],
        "size": len(content),
        "max_stars_repo_name": "a/b",
        "max_stars_repo_path": name,
        "max_stars_repo_licenses": licences,
        "max_stars_count": stars,
    }


ROWS = [
    stack_row("src/a.py", "print(1)\n", ["MIT"]),
    stack_row("src/b.rs", "fn main() {}\n", ["MIT", "Apache-2.0"], 0),
    stack_row("src/c.py", "x = '\u00e9\u00e9\u00e9\u00e9'\n", ["GPL-3.0", "MIT"], None),
    stack_row("src/d.py", "import os  # long enough to be large\n", []),
]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json.gz"])
@pytest.mark.parametrize(
    ("options", "kept", "reason"),
    [
        ({}, "abcd", None),
        ({"languages": ["python"]}, "acd", "another language"),
        ({"extensions": [".rs", "go"]}, "b", "another extension"),
        ({"licences": ["mit", "apache-2.0"]}, "ab", "another licence, or none"),
        ({"min_bytes": 13}, "bcd", "smaller than min_bytes"),
        ({"max_bytes": 13}, "ab", "larger than max_bytes"),  # c has 11 characters and 15 bytes
        ({"languages": ["Python", "Rust"], "min_bytes": 10, "max_bytes": 20}, "bc", None),
    ],
)
def test_filters(
    name: str,
    options: dict[str, Any],
    kept: str,
    reason: str | None,
    write_table: Callable[..., Path],
    make_tables: MakeTables,
    read_shard: ReadShard,
) -> None:
    shard = write_table(name, ROWS)
    dataset = make_tables("code", **options)
    assert [sample.text for sample in read_shard(dataset, shard)] == [ROWS["abcd".index(k)]["content"] for k in kept]
    notes = Counter(note for record in dataset.scan(shard) for note in record.notes)
    assert sum(notes.values()) == 4 - len(kept), "what is left out keeps its place"
    if reason is not None:
        assert notes == {f"left out: {reason}": 4 - len(kept)}


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({"languages": ["Python"]}, "lang, language, programming_language"),
        ({"extensions": ["py"]}, "ext, max_stars_repo_path, path, file_path, filename"),
        ({"licences": ["MIT"]}, "max_stars_repo_licenses, licenses, license, detected_licenses"),
    ],
)
def test_a_filter_on_what_the_data_does_not_say_is_told(
    name: str, options: dict[str, Any], columns: str, write_table: Callable[..., Path], make_tables: MakeTables
) -> None:
    shard = write_table(name, [{"content": "x = 1", "stars": 1}])
    [record] = make_tables("code", **options).scan(shard)
    assert (record.num_samples, record.notes) == (0, (f"left out: none of the columns {columns}",))


def test_columns_of_other_collections(
    write_table: Callable[..., Path], make_tables: MakeTables, read_shard: ReadShard
) -> None:
    rows = [
        {"code": "x", "path": "a/b.py", "repo_name": "r/s", "language": "Python", "license": "mit"},
        {"code": "y", "path": "a/b.c", "repo_name": "r/s", "language": "C", "license": "gpl"},
    ]
    dataset = make_tables(
        "code", column="code", extensions="py", languages="PYTHON", licences="MIT", repo_metadata=True
    )
    samples = read_shard(dataset, write_table("a.parquet", rows))
    assert [sample.text for sample in samples] == ["<reponame>r/s<filename>a/b.py\nx"]


def test_metadata_stands_in_front(
    write_table: Callable[..., Path], make_tables: MakeTables, read_shard: ReadShard
) -> None:
    dataset = make_tables("code", repo_metadata=True, tokens={"stars": "<stars>"})
    texts = [sample.text for sample in read_shard(dataset, write_table("a.parquet", ROWS))]
    assert texts[:3] == [
        "<reponame>a/b<filename>src/a.py<stars>10-100\nprint(1)\n",
        "<reponame>a/b<filename>src/b.rs<stars>0\nfn main() {}\n",
        "<reponame>a/b<filename>src/c.py\nx = '\u00e9\u00e9\u00e9\u00e9'\n",
    ]
    assert [star_bucket(stars) for stars in (-1, 0, 1, 10, 11, 100, 101, 1000, 1001)] == [
        *("0", "0", "1-10", "1-10", "10-100", "10-100", "100-1000", "100-1000", "1000+")
    ]


def test_filling_in_the_middle_keeps_every_character() -> None:
    text = "".join(map(chr, range(33, 33 + 40)))
    orders: Counter[str] = Counter()
    cuts = set()
    for seed in range(300):
        found = fill_in_the_middle(text, STARCODER, 0.5, 0.5, seed)
        if "<fim_prefix>" not in found:
            assert found == text
            orders["plain"] += 1
            continue
        prefix, _, rest = found.removeprefix("<fim_prefix>").partition("<fim_suffix>")
        suffix, _, middle = rest.partition("<fim_middle>")
        assert prefix + middle + suffix == text
        orders["PSM" if prefix else "SPM"] += 1
        cuts.add(len(suffix))
    assert 115 < orders["plain"] < 185
    assert 50 < orders["PSM"] < 100
    assert 50 < orders["SPM"] < 100
    assert len(cuts) > 30


def test_filling_in_the_middle_depends_on_seed_and_text_alone() -> None:
    assert fill_in_the_middle("abcdef", STARCODER, 1, 0, 3) == "<fim_prefix>a<fim_suffix>ef<fim_middle>bcd"
    assert fill_in_the_middle("abcdef", STARCODER, 1, 1, 3) == "<fim_prefix><fim_suffix>ef<fim_middle>abcd"
    assert fill_in_the_middle("abcdef", STARCODER, 0, 1, 0) == "abcdef"


def test_metadata_stays_in_front_of_what_is_rearranged(
    write_table: Callable[..., Path], make_tables: MakeTables, read_shard: ReadShard
) -> None:
    shard = write_table("a.jsonl", ROWS[:1])
    tokens = {"prefix": "<PRE>", "suffix": "<SUF>", "middle": "<MID>"}
    dataset = make_tables("code", fim_rate=1.0, repo_metadata=True, tokens=tokens)
    (sample,) = read_shard(dataset, shard)
    assert str(sample.text).startswith("<reponame>a/b<filename>src/a.py<gh_stars>10-100\n<PRE>")
    assert read_shard(dataset, shard) == [sample]
    assert dataset.scan_identity()["seed"] == 0, "another seed gives other rows"
    assert "seed" not in make_tables("code").scan_identity()


def test_a_file_that_holds_the_tokens_forges_nothing(
    write_table: Callable[..., Path], make_tables: MakeTables, read_shard: ReadShard
) -> None:
    rows = [
        {"content": "a<fim_middle>b", "path": "x.py"},
        {"content": "abc", "path": "<fim_prefix>.py"},
        {"content": "a<reponame>b", "path": "x.py"},
        {"content": "abc", "path": "x.py"},
    ]
    shard = write_table("a.jsonl", rows)
    dataset = make_tables("code", fim_rate=1, repo_metadata=True, validate=True)
    samples = read_shard(dataset, shard)
    assert [sample.text for sample in samples[:3]] == ["a<fim_middle>b", "abc", "a<reponame>b"]
    assert all(sample.special_tokens == () and len(sample.notes) == 1 for sample in samples[:3])
    assert str(samples[3].text).startswith("<filename>x.py\n<fim_prefix>")
    assert set(samples[3].special_tokens) == {*STARCODER, "<reponame>", "<filename>", "<gh_stars>"}
    assert [len(record.notes) for record in dataset.scan(shard)] == [1, 1, 1, 0]
    (plain, *_) = read_shard(make_tables("code"), shard)
    assert (plain.text, plain.special_tokens, plain.notes) == ("a<fim_middle>b", (), ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fim_rate": 1.5}, r"data\.options\.fim_rate is 1\.5: a part, from 0 to 1"),
        ({"min_bytes": -1}, r"data\.options\.min_bytes is -1 and max_bytes None"),
        ({"min_bytes": 10, "max_bytes": 5}, r"data\.options\.min_bytes is 10 and max_bytes 5"),
        ({"tokens": {"begin": "x"}}, r"data\.options\.tokens: begin unknown; there are repo, file"),
        ({"languages": [1]}, r"data\.options\.languages is \[1\]: a list of texts is expected"),
        ({"fim_rate": "half"}, r"data\.options\.fim_rate is 'half': a number is expected"),
        ({"max_bytes": True}, r"data\.options\.max_bytes is True: a whole number is expected"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, make_tables: MakeTables) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tables("code", **options)


def test_a_file_without_content_is_named(write_table: Callable[..., Path], make_tables: MakeTables) -> None:
    for bad, message in (
        ({"content": None}, "not NoneType"),
        ({"content": " \n"}, "empty"),
        ({"code": "x"}, "columns: code"),
    ):
        shard = write_table("a.jsonl", [ROWS[0], bad])
        with pytest.raises(DataError, match=rf"a\.jsonl:2: field content: .*{message}"):
            list(make_tables("code", validate=True).scan(shard))


@pytest.mark.parametrize("options", [{"licences": ["MIT"]}, {"unpack_parquet": True, "languages": ["Python"]}])
def test_a_wrong_column_of_parquet_is_named_with_all_that_the_file_has(
    options: dict[str, Any], write_table: Callable[..., Path], make_tables: MakeTables
) -> None:
    """Filters need other columns, so that the file is opened: the row that is read then has those alone."""
    shard = write_table("a.parquet", ROWS)
    with pytest.raises(DataError) as caught:
        list(make_tables("code", column="text", on_bad_sample="skip", **options).scan(shard))
    fields = ", ".join(ROWS[0])
    assert str(caught.value) == (
        f"{shard}: field text: it is not there; there are {fields}: name the right one in data.options.column"
    )
