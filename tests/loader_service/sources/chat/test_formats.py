"""Rows of every chat format -> turns; bad rows are named with their field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from loader_service.sources.base import BaseSFTDataset, Sample
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.text.functions import write_functions
from stoker_proto.text.turns import Call

MakeTables = Callable[..., TableDataset]
WriteTable = Callable[..., Path]
CHAT_DATA = Path(__file__).parents[5] / "shared" / "data" / "chat"


def turns(sample: Sample) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.text, turn.learned) for turn in sample.turns]


@pytest.fixture
def one(write_table: WriteTable, make_tables: MakeTables) -> Callable[..., Sample]:
    """`one(row, **options)`: the sample of a row."""

    def read(row: dict[str, Any], **options: Any) -> Sample:
        shard = write_table("a.jsonl", [row])
        dataset = make_tables("chat", **options)
        (record,) = dataset.scan(shard)
        (sample,) = dataset.read(shard, record.offset, record.size)
        return sample

    return read


SAME = [
    ("user", "Hi", False),
    ("assistant", "Hello", True),
    ("user", "How are you?", False),
    ("assistant", "Fine", True),
]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "How are you?", "input": "", "output": "Fine", "history": [["Hi", "Hello"]]},
        {"instruction": "How are", "input": None, "output": "Fine", "history": [["Hi", "Hello"]]},
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "user", "value": "How are you?"},
                {"from": "assistant", "value": "Fine"},
            ],
            "system": "",
            "tools": "[]",
        },
        {
            "conversations": [
                {"role": "user", "content": "Hi"},
                {"from": "chatgpt", "value": "Hello"},
                {"from": "human", "value": "How are you?"},
                {"from": "bing", "value": "Fine"},
            ]
        },
        {
            "prompt": "Hi",
            "prompt_id": "f0",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello", "tool_calls": None},
                {"role": "user", "content": [{"type": "text", "text": "How "}, {"type": "text", "text": "are you?"}]},
                {"role": "assistant", "content": "Fine"},
            ],
        },
        {"id": "0", "data": ["Hi", "Hello", "How are you?", "Fine"]},
    ],
)
def test_the_formats_say_the_same(row: dict[str, Any], one: Callable[..., Sample]) -> None:
    if row.get("instruction") == "How are":
        row = {**row, "input": "you?"}
        assert turns(one(row))[2] == ("user", "How are\nyou?", False)
        return
    assert turns(one(row)) == SAME


def test_what_is_learned_is_chosen(one: Callable[..., Sample]) -> None:
    row = {"data": ["Hi", "Hello", "How are you?", "Fine"], "system": "Be kind."}
    learned = {name: [turn.learned for turn in one(row, learn=name).turns] for name in ("assistant", "last", "all")}
    assert learned == {
        "assistant": [False, False, True, False, True],
        "last": [False, False, False, False, True],
        "all": [True] * 5,
    }


@pytest.mark.long
def test_flags_of_messages_go_first(one: Callable[..., Sample]) -> None:
    def row(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello", **first},
                {"role": "user", "content": "How?"},
                {"role": "assistant", "content": "Fine", **second},
            ]
        }

    assert [turn.learned for turn in one(row({"weight": 0}, {})).turns] == [False, False, False, True]
    assert [turn.learned for turn in one(row({"train": False}, {"loss": True})).turns] == [False, False, False, True]
    assert [turn.learned for turn in one(row({"weight": 1}, {"weight": 0}), learn="last").turns] == [
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(DataError, match="no turn is learned: the flags"):
        one(row({"weight": 0}, {"weight": 0}))
    with pytest.raises(DataError, match=r"field messages\[1\]\.weight: 0\.5: 0 or 1 is expected"):
        one(row({"weight": 0.5}, {}))


TOOL = {"name": "add", "description": "Adds {numbers}", "parameters": {"type": "object"}}


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "human", "value": "1 + 2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "Three."},
            ],
            "system": "Be exact.",
            "tools": json.dumps([TOOL]),
        },
        {
            "messages": [
                {"role": "system", "content": "Be exact."},
                {"role": "user", "content": "1 + 2?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}],
                },
                {"role": "tool", "content": "3", "tool_call_id": "x"},
                {"role": "assistant", "content": "Three."},
            ],
            "tools": [TOOL],
        },
        {
            "messages": [
                {"role": "system", "content": "Be exact."},
                {"role": "user", "content": "1 + 2?"},
                {
                    "role": "assistant",
                    "content": None,
                    "function_call": {"name": "add", "arguments": '{"a": 1, "b": 2}'},
                },
                {"role": "function", "content": "3", "name": "add"},
                {"role": "assistant", "content": "Three.", "function_call": None},
            ],
            "functions": [TOOL],
        },
    ],
)
def test_functions_are_written_as_qwen_does(row: dict[str, Any], one: Callable[..., Sample]) -> None:
    """Where the template has no form of its own for them."""

    def written(**options: Any) -> list[Any]:
        sample = one(row, **options)
        return turns(replace(sample, turns=tuple(write_functions(sample.turns, sample.tools))))

    assert one(row).turns[2].calls[0].arguments == {"a": 1, "b": 2}
    assert one(row).tools == (TOOL,)
    system, *rest = written()
    assert rest == [
        ("user", "1 + 2?", False),
        ("assistant", '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>', True),
        ("tool", "3", False),
        ("assistant", "Three.", True),
    ]
    assert system[0] == "system"
    assert system[1].startswith("Be exact.\n\n# Tools\n\nYou may call one or more functions")
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in system[1]
    assert '{"name": <function-name>, "arguments": <args-json-object>}' in system[1]
    assert written(system="")[0][1].startswith("# Tools")
    assert written(system="Other.")[0][1].startswith("Other.\n\n# Tools")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"a": 1, "b": {"c": "x"}}, {"a": 1, "b": {"c": "x"}}),
        ('{"a": 1, "b": null}', {"a": 1, "b": None}),
        ("", {}),
        (" ", {}),
        (None, {}),
        ({"a": 1, "city": None, "b": {"c": None, "d": [{"e": None}]}}, {"a": 1, "b": {"d": [{}]}}),
    ],
)
def test_arguments_are_an_object_a_text_or_nothing(
    arguments: Any, expected: dict[str, Any], one: Callable[..., Sample]
) -> None:
    """Parquet gives each object the keys of all others, as null. In a JSON text null is what its author wrote."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    row = {
        "messages": [
            {"role": "user", "content": "1 + 2?", "tool_calls": None, "tool_call_id": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Three.", "tool_calls": []},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": None, "strict": None}}],
    }
    sample = one(row)
    assert sample.turns[1].calls == (Call("add", expected, "c1"),)
    assert [turn.call_id for turn in sample.turns] == ["", "", "c1", ""]
    assert sample.tools == ({"type": "function", "function": {"name": "add"}},)


@pytest.mark.parametrize(
    "call",
    [
        {"name": "add", "args": {"a": 1}, "id": "c1", "type": "tool_call"},
        {"name": "add", "parameters": {"a": 1}, "id": "c1"},
        {"name": "add", "input": {"a": 1}, "id": "c1", "arguments": None},
        {"id": "c1", "type": "function", "function": {"name": "add", "parameters": '{"a": 1}'}},
        {"id": "c1", "function": {"name": "add"}, "args": {"a": 1}},
    ],
)
def test_arguments_may_have_other_names(call: dict[str, Any], one: Callable[..., Sample]) -> None:
    """LangChain's, Llama 3's. Under a name that nobody reads, a call without arguments would be learned."""
    asked = {"role": "user", "content": "1?"}
    rows = [
        {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}]},
        {"conversations": [asked, {"from": "function_call", "value": json.dumps(call)}]},
        {"conversations": [asked, {"role": "function_call", "content": json.dumps([call])}]},
        {"messages": [asked, {"role": "function_call", "content": json.dumps(call)}]},
    ]
    for row in rows:
        sample = one(row)
        assert sample.turns[1].calls == (Call("add", {"a": 1}, "c1"),)
        assert sample.turns[1].text == ""
        assert not sample.notes


def test_what_a_call_says_beside_is_counted_and_two_arguments_are_refused(one: Callable[..., Sample]) -> None:
    asked = {"role": "user", "content": "1?"}

    def row(**call: Any) -> dict[str, Any]:
        return {"messages": [asked, {"role": "assistant", "content": None, "tool_calls": [{"name": "add", **call}]}]}

    assert one(row(args={"a": 1}, kwargs={"b": 2}, index=0, result=None)).notes == ("not read: call field 'kwargs'",)
    with pytest.raises(DataError, match=r"tool_calls\[0\]: a call with arguments and parameters: keep the one that"):
        one(row(arguments={"a": 1}, parameters={"b": 2}))


def test_turns_of_role_and_content_are_read_alike_in_both_columns(one: Callable[..., Sample]) -> None:
    """`conversations` often has OpenAI's turns, with their calls, content in parts, and null beside a call."""
    said = [
        {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c1", "function": {"name": "add", "arguments": {}}}],
        },
        {"role": "tool", "content": "3", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Three.", "weight": 1},
    ]
    first, second = one({"conversations": said}), one({"messages": said})
    assert first == second
    assert first.turns[1].calls == (Call("add", {}, "c1"),)
    assert first.turns[2].call_id == "c1"
    del said[1]["content"]
    assert one({"conversations": said}) == second


@pytest.mark.parametrize("tools", [None, [], "", " ", "[]"])
def test_tools_that_are_absent_leave_no_system_turn(tools: Any, one: Callable[..., Sample]) -> None:
    """Else a template's own system text would go."""
    sample = one(
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}], "tools": tools}
    )
    assert sample.tools == ()
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]


def test_text_behind_a_call_stays_behind_it(one: Callable[..., Sample]) -> None:
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {}}'}
    said = [{"from": "human", "value": "Hi"}, call, call, {"from": "gpt", "value": "Done."}]
    sample = one({"conversations": said})
    assert [(turn.text, len(turn.calls)) for turn in sample.turns] == [("Hi", 0), ("", 2), ("Done.", 0)]


def test_the_system_text_of_the_config_goes_first(one: Callable[..., Sample]) -> None:
    for row in (
        {"data": ["Hi", "Hello"], "system": "Own."},
        {"messages": [{"role": m, "content": m} for m in ("system", "user", "assistant")]},
        {"data": ["Hi", "Hello"]},
        {"messages": [{"role": m, "content": m} for m in ("system", "system", "user", "assistant")]},
    ):
        found = {
            text: [turn.text for turn in one(row, system=text).turns if turn.role == "system"] for text in ("", "New.")
        }
        assert found == {"": [], "New.": ["New."]}
        assert one(row, system="").notes == (), "what the config leaves out is no broken turn"


def test_columns_with_other_names(one: Callable[..., Sample]) -> None:
    row = {"prompt": "Hi", "response": "Hello", "input": "not mine"}
    options = {"columns": {"instruction": "prompt", "output": "response", "input": "nothing"}}
    assert turns(one(row, **options)) == [("user", "Hi", False), ("assistant", "Hello", True)]
    with pytest.raises(ConfigError, match=r"data\.options\.columns: question are no fields of a format"):
        one(row, columns={"question": "prompt"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": 5, "output": "x"}, "field instruction: 5: a text is expected"),
        ({"instruction": "Hi", "input": ""}, "field output: None: a text is expected"),
        ({"instruction": "Hi", "output": "x", "input": ["y"]}, "field input: ['y']: a text is expected"),
        (
            {"instruction": "Hi", "output": "x", "history": [["q"]]},
            "field history[0]: a [question, answer] is expected",
        ),
        ({"instruction": "Hi", "output": "x", "history": "q"}, "field history: str: a list is expected"),
        ({"conversations": "Hi"}, "field conversations: str: a list is expected"),
        ({"conversations": ["Hi"]}, "field conversations[0]: str: an object is expected"),
        ({"conversations": [{"from": "alien", "value": "Hi"}]}, "field conversations[0].from: role 'alien': system, "),
        ({"conversations": [{"value": "Hi"}]}, "field conversations[0].role: role None: system, "),
        ({"conversations": [{"from": "human"}]}, "field conversations[0].value: None: a text is expected"),
        ({"conversations": [{"from": "human", "value": {"a": 1}}]}, "field conversations[0].value: {'a': 1}: a text"),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            "conversations[0].value: 'add(1)' is no JSON",
        ),
        ({"data": ["Hi", None]}, "field data[1]: None: a text is expected"),
        ({"data": ["Hi", "x"], "tools": "{"}, "field tools: '{' is no JSON"),
        ({"data": ["Hi", "x"], "tools": ["add"]}, "field tools: ['add']: a list of function definitions"),
        ({"data": ["Hi", "x"], "system": 1}, "field system: 1: a text is expected"),
        ({"messages": [{"role": "user", "content": 1}]}, "field messages[0].content: int: a text or a list of parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0]: a part of type 'audio'",
        ),
        ({"messages": [{"role": "user", "content": None}]}, "field messages[0].content: NoneType: a text or a list"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}]},
            "field messages[0].tool_calls[0].name: None: the name of a function is expected",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "function_call": "add"}]},
            "field messages[0].function_call: an object with name and arguments is expected",
        ),
        ({"data": ["Hi", "x"], "functions": ["add"]}, "field functions: ['add']: a list of function definitions"),
        ({"messages": []}, "a dialogue without a turn"),
        (
            {"text": "plain"},
            "fields text: none of the known formats, which are messages (messages), sharegpt (conversations)",
        ),
        ({"chosen": [], "rejected": []}, "fields chosen, rejected: none of the known formats"),
    ],
)
def test_a_bad_row_names_file_line_and_field(
    row: dict[str, Any], message: str, write_table: WriteTable, make_tables: MakeTables
) -> None:
    good = {"instruction": "a", "output": "b", "conversations": None}
    kind = next((key for key in ("messages", "conversations", "data") if key in row), None)
    if kind is not None:
        pair = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "data": ["a", "b"],
        }
        good = {kind: pair[kind]}
    shard = write_table("a.jsonl", [good, row])
    with pytest.raises(DataError) as caught:
        list(make_tables("chat", validate=True).scan(shard))
    assert str(caught.value).startswith(f"{shard}:2: ")
    assert message in str(caught.value)


def test_a_known_format_that_is_not_there_is_said(write_table: WriteTable, make_tables: MakeTables) -> None:
    shard = write_table("a.jsonl", [{"data": ["a", "b"]}])
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: field messages: it is not there, and data\.options\.format is messages"
    ):
        list(make_tables("chat", format="messages").scan(shard))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"format": "alpaca", "columns": {"output": "response"}},
            "field instruction: it is not there, and data.options.format is alpaca; there are id, text",
        ),
        (
            {"format": "alpaca", "columns": {"instruction": "ask"}},
            "field instruction: data.options.columns calls it ask, which is not there; there are id, text",
        ),
        ({"columns": {"output": "response"}}, "fields id, text: none of the known formats"),
    ],
)
def test_the_fields_that_are_shown_are_those_of_the_file(
    options: dict[str, Any], message: str, write_table: WriteTable, make_tables: MakeTables
) -> None:
    shard = write_table("a.jsonl", [{"id": "1", "text": "x"}])
    with pytest.raises(DataError) as caught:
        list(make_tables("chat", **options).scan(shard))
    assert str(caught.value).startswith(f"{shard}:1: {message}")
    assert ", output" not in str(caught.value)


@pytest.mark.parametrize("place", [1, 15, 16, 40])
def test_mixed_formats_in_one_file_are_named(
    place: int,
    write_table: WriteTable,
    make_tables: MakeTables,
    read_shard: Callable[[BaseSFTDataset, Path], list[Sample]],
) -> None:
    rows: list[dict[str, Any]] = [{"data": ["a", "b"]}] * 50
    rows[place] = {"instruction": "a", "output": "b"}
    shard = write_table("a.json", rows)
    dataset = make_tables("chat")
    with pytest.raises(DataError) as caught:
        read_shard(dataset, shard)
    assert f"a.json: record {place} (byte " in str(caught.value)
    assert "a row of format alpaca in a file that begins with format ultrachat" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lern": "all"}, r"data\.options\.lern: unknown option; did you mean learn\?"),
        (
            {"zebra": 1},
            r"data\.options\.zebra: unknown option; chat takes columns, format, learn, reasoning, roles, system, turn_fields, ",
        ),
        ({"learn": "some"}, r"data\.options\.learn is 'some': choose one of assistant, last, all"),
        ({"validate": 1}, r"data\.options\.validate is 1: true or false is expected"),
        ({"system": 5}, r"data\.options\.system is 5: a text is expected"),
        ({"columns": ["a"]}, r"data\.options\.columns is \['a'\]: texts by name are expected"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str, make_tables: MakeTables) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tables("chat", **options)


@pytest.mark.skipif(not CHAT_DATA.is_dir(), reason=f"{CHAT_DATA} is not there: real chat files are not read")
def test_real_files(make_tables: MakeTables, read_shard: Callable[[BaseSFTDataset, Path], list[Sample]]) -> None:
    dataset = make_tables("chat", validate=True)
    for name, count in (("alpaca_identity.json", 91), ("sharegpt_dummy_conversation.json", 500)):
        rows = json.loads((CHAT_DATA / name).read_bytes())
        samples = read_shard(dataset, CHAT_DATA / name)
        assert len(samples) == len(rows) == count
        for row, sample in zip(rows, samples, strict=True):
            texts = [turn["value"] for turn in row["conversations"]] if "conversations" in row else None
            if texts is None:
                assert row["input"] == ""
                texts = [row["instruction"], row["output"]]
            assert [turn.text for turn in sample.turns] == texts[: len(sample.turns)]
            assert [turn.role for turn in sample.turns] == ["user", "assistant"] * (len(sample.turns) // 2)
            assert len(texts) - len(sample.turns) in (0, 1), "at most a last turn of the user is dropped"
