"""Half of a surrogate pair: a field that nobody reads does not refuse its row, a field that is read is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.errors import DataError

MakeTables = Callable[..., TableDataset]
HALF = "half \ud800 a character"
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
CALL: dict[str, Any] = {"name": "add", "arguments": {"a": [1, HALF]}}
PNG = {"type": "image_url", "image_url": {"url": HALF}}


def turns(**more: Any) -> list[dict[str, Any]]:
    """The dialogue with these fields on the answer."""
    return [SAID[0], {**SAID[1], **more}]


def read(path: Path, row: dict[str, Any], make_tables: MakeTables, kind: str, name: str, **options: Any) -> Any:
    shard = path / name
    good = {"text": "x", "content": "x", **row}
    lines = [json.dumps({key: "x" if value == HALF else value for key, value in good.items()}), json.dumps(row)]
    shard.write_text("\n".join(lines) + "\n" if name.endswith("l") else json.dumps([row, row]))
    dataset = make_tables(kind, **options)
    records = list(dataset.scan(shard))
    [sample] = dataset.read(shard, records[1].offset, records[1].size)
    return sample


UNUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("chat", {"messages": SAID}),
    "a turn's field": ("chat", {"messages": turns(name=HALF)}),
    "a user's reasoning": ("chat", {"messages": [{**SAID[0], "reasoning": HALF}, SAID[1]]}),
    "a part's field": ("chat", {"messages": turns(content=[{"type": "text", "text": "Hello", "note": HALF}])}),
    "turns as text": ("chat", {"messages": json.dumps(turns(name=HALF))}),
    "sharegpt": ("chat", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
    "sharegpt's turn": (
        "chat",
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "who": HALF}]},
    ),
    "ultrachat": ("chat", {"data": ["Hi", "Hello"]}),
    "alpaca": ("chat", {"instruction": "Hi", "output": "Hello"}),
    "prompt and completion": ("chat", {"prompt": "Hi", "completion": "Hello"}),
    "text": ("text", {"text": "Hello"}),
    "code": ("code", {"content": "Hello"}),
    "token ids": ("text", {"input_ids": [5, 6, 7]}),
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("case", UNUSED)
def test_a_field_that_nobody_reads_does_not_refuse_the_row(
    case: str, name: str, tmp_path: Path, make_tables: MakeTables
) -> None:
    kind, row = UNUSED[case]
    row = {"note": HALF, "more": [{"\udc00": 1}], **row}
    sample = read(tmp_path, row, make_tables, kind, name)
    said = [turn.text for turn in sample.turns] if kind == "chat" else [sample.text]
    if "input_ids" in row:
        assert sample.input_ids.tolist() == [5, 6, 7]
    else:
        assert said[-1] == "Hello"
    assert "not read: field 'note'" in sample.notes


USED: dict[str, tuple[str, dict[str, Any], str]] = {
    "content": ("chat", {"messages": turns(content=HALF)}, "messages[1].content"),
    "a part": ("chat", {"messages": turns(content=[{"type": "text", "text": HALF}])}, "messages[1].content[0].text"),
    "turns as text": ("chat", {"messages": json.dumps(turns(content=HALF))}, "messages[1].content"),
    "reasoning": ("chat", {"messages": turns(reasoning_content=HALF)}, "messages[1].reasoning_content"),
    "a role": ("chat", {"messages": [{**SAID[0], "role": HALF}, SAID[1]]}, "messages[0].role"),
    "arguments": (
        "chat",
        {"messages": turns(tool_calls=[{"function": CALL}])},
        "messages[1].tool_calls[0].arguments.a[1]",
    ),
    "arguments as text": (
        "chat",
        {"messages": turns(tool_calls=[{"function": {"name": "add", "arguments": json.dumps({"a": HALF})}}])},
        "messages[1].tool_calls[0].arguments.a",
    ),
    "a key of arguments": (
        "chat",
        {"messages": turns(tool_calls=[{"function": {"name": "add", "arguments": {"\ud800": 1}}}])},
        "messages[1].tool_calls[0].arguments.\\ud800",
    ),
    "a call's id": ("chat", {"messages": turns(tool_calls=[{"id": HALF, "function": {"name": "f"}}])},
                    "messages[1].tool_calls[0].id"),
    "an answer's id": (
        "chat", {"messages": [SAID[0], {"role": "tool", "content": "3", "tool_call_id": HALF}, SAID[1]]},
        "messages[1].tool_call_id",
    ),
    "tools": ("chat", {"messages": SAID, "tools": [{"name": "f", "description": HALF}]}, "tools[0].description"),
    "tools as text": ("chat", {"messages": SAID, "tools": json.dumps([{"name": HALF}])}, "tools[0].name"),
    "the system text": ("chat", {"messages": SAID, "system": HALF}, "system"),
    "an image": ("chat", {"messages": SAID, "image": HALF}, "image"),
    "an image of a part": (
        "chat", {"messages": [{"role": "user", "content": [PNG]}, SAID[1]]}, "images[0]"
    ),
    "sharegpt": (
        "chat", {"conversations": [{"from": "human", "value": HALF}, {"from": "gpt", "value": "Hello"}]},
        "conversations[0].value",
    ),
    "ultrachat": ("chat", {"data": ["Hi", HALF]}, "data[1]"),
    "alpaca": ("chat", {"instruction": "Hi", "input": HALF, "output": "Hello"}, "input"),
    "alpaca's history": ("chat", {"instruction": "Hi", "output": "Hello", "history": [["a", HALF]]}, "history[0][1]"),
    "a prompt": ("chat", {"prompt": HALF, "completion": "Hello"}, "prompt"),
    "a completion": ("chat", {"prompt": "Hi", "completion": HALF}, "completion"),
    "text": ("text", {"text": HALF}, "text"),
    "code": ("code", {"content": HALF}, "content"),
}  # fmt: skip


@pytest.mark.parametrize("case", USED)
def test_a_field_that_is_read_is_named(case: str, tmp_path: Path, make_tables: MakeTables) -> None:
    kind, row, field = USED[case]
    shard = tmp_path / "a.jsonl"
    shard.write_text("\n" + json.dumps(row) + "\n")
    dataset = make_tables(kind)
    with pytest.raises(DataError) as caught:
        _read_all(dataset, shard)
    assert str(caught.value).startswith(f"{shard}:2: field {field}: ")
    assert str(caught.value).endswith(": half of a surrogate pair is no character; correct or remove the row")
    assert "\\ud800" in str(caught.value)
    str(caught.value).encode()  # it travels


def _read_all(dataset: TableDataset, shard: Path) -> None:
    for record in dataset.scan(shard):
        list(dataset.read(shard, record.offset, record.size))


def test_what_a_filter_of_code_looks_at_is_read(tmp_path: Path, make_tables: MakeTables) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_text(json.dumps({"content": "x", "lang": HALF, "ext": HALF}) + "\n")
    dataset = make_tables("code", languages=["Python"])
    with pytest.raises(DataError, match=r"a\.jsonl:1: field lang: .*half of a surrogate pair"):
        list(dataset.scan(shard))
    assert len(list(make_tables("code").scan(shard))) == 1
