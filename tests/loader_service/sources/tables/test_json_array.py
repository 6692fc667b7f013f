"""The objects of a JSON array, found without parsing it: whatever the array, whatever the blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loader_service.sources.tables import json_array
from loader_service.sources.tables.json_array import iter_elements
from stoker_proto.errors import DataError

TEXTS = st.text(st.one_of(st.sampled_from('"\\[]{},: \n\u00e9'), st.characters(codec="utf-8")), max_size=12)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
ARRAYS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=6)
MANY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def elements(path: Path, content: bytes, block_bytes: int) -> list[Any]:
    """What the elements of the content parse to."""
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "BLOCK_BYTES", block_bytes)
        spans = list(iter_elements(path))
    assert all(content[offset : offset + 1] == b"{" for offset, _ in spans)
    return [json.loads(content[offset : offset + size]) for offset, size in spans]


@pytest.mark.long
@MANY
@given(
    array=ARRAYS,
    indent=st.sampled_from([None, 0, 2]),
    is_ascii=st.booleans(),
    block_bytes=st.integers(1, 40),
    around=st.sampled_from(["", " ", "\n\n", "\r\n\t"]),
    mark=st.booleans(),
)
def test_it_finds_what_json_loads_finds(
    tmp_path: Path, array: list[Any], indent: int | None, is_ascii: bool, block_bytes: int, around: str, mark: bool
) -> None:
    text = around + json.dumps(array, indent=indent, ensure_ascii=is_ascii) + around
    content = (b"\xef\xbb\xbf" if mark else b"") + text.encode("utf-8")
    assert elements(tmp_path / "a.json", content, block_bytes) == array


@pytest.mark.long
@MANY
@given(array=ARRAYS, block_bytes=st.integers(1, 40), data=st.data())
def test_every_cut_is_noticed(tmp_path: Path, array: list[Any], block_bytes: int, data: st.DataObject) -> None:
    content = json.dumps(array, ensure_ascii=False).encode("utf-8")
    stop = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(DataError, match=rf"a\.json: .*byte {stop}\b"):
        elements(tmp_path / "a.json", content[:stop], block_bytes)


@MANY
@given(array=ARRAYS, block_bytes=st.integers(1, 40), data=st.data())
def test_a_damaged_array_is_an_error_or_gives_what_a_parser_gives(
    tmp_path: Path, array: list[Any], block_bytes: int, data: st.DataObject
) -> None:
    content = bytearray(json.dumps(array).encode())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place : place + data.draw(st.integers(0, 2))] = data.draw(
        st.sampled_from([b"", b'"', b"]", b"}", b",", b"{x"])
    )
    try:
        found = elements(tmp_path / "a.json", bytes(content), block_bytes)
    except (DataError, ValueError):  # the scanner says so, or whoever parses the record
        return
    assert found == json.loads(content)


@pytest.mark.parametrize("text", ['"', "\\", '\\"', '"\\', "\\\\", '\\\\"', '\\"]', '}\\\\"{', "\\" * 9, '\\"' * 9])
@pytest.mark.parametrize("block_bytes", range(1, 12))
def test_escapes_are_no_ends_of_strings(tmp_path: Path, text: str, block_bytes: int) -> None:
    array = [{text: text}, {"a": [text, {"b": text}]}, {}]
    assert elements(tmp_path / "a.json", json.dumps(array).encode(), block_bytes) == array


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"b"', "breaks off at byte 15, the end of the file, inside record 1, which begins at byte 11"),
        (b'[{"a": "x}]', "inside record 0, which begins at byte 1"),
        (b'[{"a": 1}', "after 1 records: its ] is missing"),
        (b'[{"a": 1},', "after 1 records: its ] is missing"),
        (b"[", "after 0 records: its ] is missing"),
        (b"", "after 0 records: its ] is missing"),
        (b'[{"a": 1} {"b": 2}]', "'' near byte 10, before record 1"),
        (b'[{"a": 1},, {"b": 2}]', "',,' near byte 10, before record 1"),
        (b'[{"a": 1}, 17, {"b": 2}]', "17,' near byte"),
        (b'[17, {"b": 2}]', "where the JSON array begins"),
        (b"[17, 18]", "where the JSON array begins"),
        (b'[{"a": 1}] [{"b": 2}]', "before record 1"),
        (b'[{"a": 1}]]', "']]' near byte 9, before record 1"),
        (b'[{"a": 1}], "rest"', "before record 1"),
        (b"[[1, 2], [3]]", "record 0 at byte 1 is an array: JSON objects are expected"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 3, 1 << 20])
def test_what_breaks_is_named_with_its_byte(tmp_path: Path, content: bytes, message: str, block_bytes: int) -> None:
    with pytest.raises(DataError) as caught:
        elements(tmp_path / "a.json", content, block_bytes)
    assert message in str(caught.value)


@pytest.mark.parametrize("block_bytes", [7, 1 << 20])
def test_a_record_that_never_ends_fills_no_memory(
    tmp_path: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_array, "MAX_LINE_BYTES", 1000)
    with pytest.raises(DataError, match="record 0 at byte 1 has more than 1000 bytes"):
        elements(tmp_path / "a.json", b'[{"a": "' + b"x" * 2000 + b'"}]', block_bytes)
