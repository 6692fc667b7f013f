"""What turns and rows say beside their content: flags, reasoning, preferences, fields that nothing reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loader_service.sources.base import BaseSFTDataset, Sample
from loader_service.sources.tables.dataset import TableDataset
from stoker_proto.errors import DataError
from stoker_proto.text.turns import Call

MakeTables = Callable[..., TableDataset]
WriteTable = Callable[..., Path]
One = Callable[..., Sample]
CONTAINERS = ["a.jsonl", "a.json", "a.parquet", "a.jsonl.zst"]


@pytest.fixture
def one(write_table: WriteTable, make_tables: MakeTables) -> One:
    """`one(row, name="a.parquet", **options)`: the sample of a row."""

    def read(row: dict[str, Any], name: str = "a.jsonl", kind: str = "chat", **options: Any) -> Sample:
        shard = write_table(name, [row])
        dataset = make_tables(kind, **options)
        (record,) = dataset.scan(shard)
        (sample,) = dataset.read(shard, record.offset, record.size)
        return sample

    return read


def learned(sample: Sample) -> list[str]:
    return [turn.text for turn in sample.turns if turn.learned]


def two(first: dict[str, Any], second: dict[str, Any] | None = None) -> dict[str, Any]:
    """A dialogue of two exchanges, with these fields beside the answers."""
    return {
        "messages": [
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "first", **first},
            {"role": "user", "content": "b?"},
            {"role": "assistant", "content": "second", **(second or {})},
        ]
    }


def as_sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    names = {"role": "from", "content": "value"}
    return {"conversations": [{names.get(key, key): value for key, value in turn.items()} for turn in row["messages"]]}


@pytest.mark.parametrize(
    "flag",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"loss_weight": 0.0},
        {"loss_scale": 0.0},
        {"train": False},
        {"trainable": False},
        {"training": False},
        {"loss": False},
        {"learn": 0},
        {"mask": True},
        {"masked": 1},
        {"weight": 0, "trainable": False, "mask": True},
    ],
)
@pytest.mark.parametrize("name", CONTAINERS)
def test_turns_that_are_marked_are_not_learned(flag: dict[str, Any], name: str, one: One) -> None:
    for row in (two(flag), as_sharegpt(two(flag))):
        sample = one(row, name)
        assert learned(sample) == ["second"]
        assert not [note for note in sample.notes if note.startswith("not read")]


@pytest.mark.parametrize(
    "flag", [{"weight": 1}, {"weight": 1.0}, {"trainable": True}, {"mask": False}, {"weight": None}]
)
def test_other_flags_leave_a_turn_learned(flag: dict[str, Any], one: One) -> None:
    assert learned(one(two(flag))) == learned(one(as_sharegpt(two(flag)))) == ["first", "second"]


def test_mask_false_on_a_users_turn_says_nothing(one: One) -> None:
    row = two({"mask": False})
    row["messages"][0]["mask"] = False
    assert learned(one(row)) == ["first", "second"]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ({"weight": 0.5}, "weight: 0.5: 0 or 1 is expected; every label has the same weight in training"),
        ({"loss_weight": 2}, "loss_weight: 2: 0 or 1 is expected"),
        ({"weight": math.nan}, "weight: nan: 0 or 1 is expected"),
        ({"loss_weight": math.nan}, "loss_weight: nan: 0 or 1 is expected"),
        ({"weight": math.inf}, "weight: inf: 0 or 1 is expected"),
        ({"mask": "yes"}, "mask: 'yes': 0 or 1 is expected"),
        (
            {"weight": 1, "trainable": False},
            "its flags contradict each other (weight learns, trainable does not learn)",
        ),
        (
            {"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]},
            "train_detail: parts of a turn cannot",
        ),
    ],
)
@pytest.mark.parametrize("name", CONTAINERS)
def test_flags_that_cannot_be_honoured_are_refused(flag: dict[str, Any], message: str, name: str, one: One) -> None:
    for row in (two(flag), as_sharegpt(two(flag))):
        with pytest.raises(DataError) as caught:
            one(row, name)
        assert message in str(caught.value)
        assert "[1]" in str(caught.value)


ROWS = {
    "alpaca": {"instruction": "Hi", "output": "Hello"},
    "sharegpt": as_sharegpt(two({})),
    "messages": two({}),
    "ultrachat": {"data": ["Hi", "Hello"]},
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_row_that_is_not_to_be_learned_is_refused(kind: str, name: str, one: One) -> None:
    assert learned(one({**ROWS[kind], "weight": 1.0}, name))
    for flag, message in (
        ({"weight": 0}, "the row says that it is not to be learned"),
        ({"trainable": False}, "the row says that it is not to be learned"),
        ({"loss_weight": 0.3}, "field loss_weight: 0.3: 0 or 1 is expected"),
        ({"weight": math.nan}, "field weight: nan: 0 or 1 is expected"),
    ):
        with pytest.raises(DataError) as caught:
            one({**ROWS[kind], **flag}, name)
        assert message in str(caught.value)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_a_field_of_the_turn(name: str, one: One) -> None:
    rows = [
        two({name: "why"}),
        as_sharegpt(two({name: "why"})),
        {"prompt": "a?", "completion": [{"role": "assistant", "content": "first", name: "why"}]},
        {"prompt": "a?", "completion": "first", name: "why"},
        {"instruction": "a?", "output": "first", name: "why"},
    ]
    for row in rows:
        sample = one(row)
        assert [(turn.text, turn.reasoning) for turn in sample.turns][:2] == [("a?", None), ("first", "why")]
        assert sample.notes == ("reasoning beside the content: handed to the template (data.options.reasoning)",)
        inline = one(row, reasoning="inline")
        assert (inline.turns[1].text, inline.turns[1].reasoning) == ("<think>\nwhy\n</think>\n\nfirst", None)
        assert inline.notes == ("reasoning beside the content: written into it as <think> (data.options.reasoning)",)
        dropped = one(row, reasoning="drop")
        assert (dropped.turns[1].text, dropped.turns[1].reasoning) == ("first", None)
        assert dropped.notes == ("reasoning beside the content: left out (data.options.reasoning)",)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "thinking", "thinking": "why"},
        {"type": "reasoning", "text": "why"},
        {"type": "reasoning", "reasoning": "why"},
    ],
)
def test_reasoning_in_parts_is_reasoning(part: dict[str, Any], one: One) -> None:
    row = two({"content": [part, {"type": "text", "text": "first"}]})
    assert [(turn.text, turn.reasoning) for turn in one(row).turns][1] == ("first", "why")


def test_an_answer_of_reasoning_alone_is_kept(one: One) -> None:
    turns = one(two({"content": "", "reasoning": "why"})).turns
    assert [(turn.role, turn.text, turn.reasoning) for turn in turns][1] == ("assistant", "", "why")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reasoning": "one", "thinking": "two"}, "field messages[1]: reasoning and thinking differ: keep one of them"),
        ({"reasoning": ["one"]}, "field messages[1].reasoning: list: a text is expected"),
        ({"thinking": True}, "field messages[1].thinking: bool: a text is expected"),
        (
            {"content": [{"type": "text", "text": "x", "weight": 0}]},
            "content[0].weight: a part of a turn cannot be left out",
        ),
        ({"content": [{"type": "text", "text": "x", "train": False}]}, "content[0].train: a part of a turn cannot"),
    ],
)
def test_what_a_turn_cannot_say_is_refused(fields: dict[str, Any], message: str, one: One) -> None:
    with pytest.raises(DataError) as caught:
        one(two(fields))
    assert message in str(caught.value)


PAIR = "a preference row (chosen and rejected): it says which answer is better"
PREFERENCES: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}, PAIR),
    ({"prompt": [{"role": "user", "content": "x?"}], "chosen": [{"role": "assistant", "content": "good"}], "rejected": []},
     "a preference row (chosen)"),
    ({"instruction": "a", "output": "b", "chosen": "c", "rejected": "d"}, PAIR),
    ({**two({}), "chosen": "c", "rejected": "d"}, PAIR),
    ({"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "b"},
      "rejected": {"from": "gpt", "value": "c"}}, PAIR),
    ({"data": ["a", "b"], "rejected": "c"}, "a preference row (rejected)"),
    ({"prompt": "a", "completion": "b", "label": False}, "a preference row (label: false): it says whether the answer is wanted"),
    ({"prompt": "a", "completion": "b", "label": True}, "a preference row (label: true)"),
    ({**two({}), "label": False}, "a preference row (label: false)"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), PREFERENCES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_preference_rows_are_refused_by_name(row: dict[str, Any], message: str, name: str, one: One) -> None:
    with pytest.raises(DataError) as caught:
        one(row, name)
    assert message in str(caught.value)
    if "text" not in row:
        for kind in ("text", "code"):
            with pytest.raises(DataError) as caught:
                one({**row, "text": "t", "content": "c"}, name, kind=kind)
            assert message in str(caught.value)


def test_the_chosen_answers_are_learned_where_the_options_say_so(one: One) -> None:
    row = {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."}
    sample = one(row, columns={"completion": "chosen"})
    assert [(turn.text, turn.learned) for turn in sample.turns] == [("Name a colour.", False), ("Blue.", True)]
    assert sample.notes == ("not read: field 'rejected'",)
    dialogue = {"prompt": "Hi", "chosen": two({})["messages"], "rejected": []}
    assert learned(one(dialogue, columns={"messages": "chosen"})) == ["first", "second"]
    with pytest.raises(
        DataError, match=r"begins with a turn of role user: .* a whole dialogue is named by .*messages: "
    ):
        one(dialogue, columns={"completion": "chosen"})
    with pytest.raises(DataError, match=r"a preference row \(label: false\)"):
        one({"prompt": "a", "completion": "b", "label": False}, format="prompt_completion")


@pytest.mark.parametrize("kind", ROWS)
def test_fields_that_nothing_reads_are_named(kind: str, one: One) -> None:
    row = {**ROWS[kind], "score": 0.5, "source": "web", "id": "7", "empty": "", "none": None, "list": []}
    assert one(row).notes == ("not read: field 'score'", "not read: field 'source'")


def test_a_field_beside_another_that_is_read_instead_is_named(one: One) -> None:
    turns = [{"from": who, "value": said} for who, said in (("system", "A"), ("human", "Hi"), ("gpt", "Hello"))]
    row: dict[str, Any] = {"conversations": turns, "tools": [{"name": "f"}]}
    assert one(row).notes == one({**row, "system": "A", "functions": [], "image": ""}).notes == ()
    said = one({**row, "system": "B", "functions": [{"name": "g"}]})
    assert said.notes == ("not read: field 'system'", "not read: field 'functions'")
    assert (said.turns[0].text, [tool["name"] for tool in said.tools]) == ("A", ["f"])
    blank = one({"conversations": [{"from": "system", "value": " "}, *turns[1:]], "system": "B"})
    assert ([turn.text for turn in blank.turns], blank.notes) == (["B", "Hi", "Hello"], ())


def test_fields_of_turns_and_parts_are_named_once(one: One) -> None:
    part = {"type": "text", "text": "first", "cache_control": {"type": "ephemeral"}}
    row = two({"content": [part], "name": "Ann", "refusal": None}, {"name": "Ann", "prefix": True})
    row["messages"][0]["reasoning"] = "a user's"
    row["messages"][2]["tool_call_id"] = "x"
    assert one(row).notes == (
        "not read: turn field 'reasoning'",
        "not read: part field 'cache_control'",
        "not read: turn field 'name'",
        "not read: turn field 'prefix'",
    )
    sharegpt = as_sharegpt(two({"mood": "calm"}))
    assert one(sharegpt).notes == ("not read: turn field 'mood'",)
    long = one({**ROWS["ultrachat"], "k" * 1000: 1}).notes[0]
    assert long == f"not read: field '{'k' * 56}..."


def test_what_no_model_is_shown_is_refused(one: One) -> None:
    for column in ("videos", "audios"):
        assert one({**two({}), column: []})
        with pytest.raises(DataError, match=rf"field {column}: only images are read"):
            one({**two({}), column: ["a.mp4"]})


def test_code_and_text_name_their_fields(one: One) -> None:
    assert one({"text": "Once", "meta": {"a": 1}, "labels": [1]}, kind="text").notes == (
        "not read: field 'meta'",
        "not read: field 'labels'",
    )
    assert one({"input_ids": [5, 6], "labels": [5, 6], "meta": 1}, kind="text").notes == ("not read: field 'meta'",)
    assert one({"content": "x = 1", "lang": "Python", "size": 5, "hexsha": "ab"}, kind="code").notes == (
        "not read: field 'hexsha'",
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_first_rows_are_looked_at_without_validate(
    name: str,
    write_table: WriteTable,
    make_tables: MakeTables,
    read_shard: Callable[[BaseSFTDataset, Path], list[Sample]],
) -> None:
    rows = [{**two({}), "score": 1}, {**two({"name": "Ann"}), "score": None}, {**two({"weight": 0.5}), "score": 1}]
    some = " (of the first 1,000 rows of each part; data.options.validate looks at all)"
    notes = [record.notes for record in make_tables("chat").scan(write_table(name, rows))]
    unread = f"not read: field 'score'{some}"
    in_all = (unread,) if name == "a.parquet" else ()  # a column is there in all rows
    assert notes[0] == (unread,)
    assert notes[1] == (*in_all, f"not read: turn field 'name'{some}")
    assert notes[2] == (), "a bad row is told when it is read"


def test_roles_and_fields_of_turns_may_have_other_names(one: One) -> None:
    row = {
        "dialog": [{"speaker": "Client", "utterance": "Hi"}, {"speaker": "Bot", "utterance": "Hello", "mood": "calm"}]
    }
    options: dict[str, Any] = {"roles": {"Client": "user", "Bot": "assistant"}}
    for column, names in (
        ("messages", {"role": "speaker", "content": "utterance"}),
        ("conversations", {"from": "speaker", "value": "utterance"}),
    ):
        sample = one(row, columns={column: "dialog"}, turn_fields=names, **options)
        assert [(turn.role, turn.text, turn.learned) for turn in sample.turns] == [
            ("user", "Hi", False),
            ("assistant", "Hello", True),
        ]
        assert sample.notes == ("not read: turn field 'mood'",)
    with pytest.raises(
        DataError, match=r"role 'Client': .* name others in data\.options\.roles, e\.g\. \{bot: assistant\}"
    ):
        one(row, columns={"messages": "dialog"}, turn_fields={"role": "speaker", "content": "utterance"})
    call = {
        "conversations": [{"from": "human", "value": "?"}, {"from": "fn", "value": '{"name": "f", "arguments": {}}'}]
    }
    assert one(call, roles={"fn": "function_call"}).turns[1].calls == (Call("f", {}),)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_turns_may_be_json_text_or_lists_by_field(column: str, one: One) -> None:
    row = two({"weight": 0}) if column == "messages" else as_sharegpt(two({"weight": 0}))
    turns = row[column]
    names = dict.fromkeys(name for turn in turns for name in turn)
    by_field = {name: [turn.get(name) for turn in turns] for name in names}
    for value in (json.dumps(turns), by_field, json.dumps(by_field)):
        assert learned(one({column: value})) == ["second"]
    with pytest.raises(DataError, match=rf"field {column}: '\[\{{\"role\": ' is no JSON"):
        one({column: '[{"role": '})
    with pytest.raises(DataError, match=f"field {column}: fields with lists of different lengths"):
        one({column: {**by_field, "extra": [1]}})


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_prompt_and_completion(name: str, one: One) -> None:
    answer = {"role": "assistant", "content": "Hello."}
    turns = [{"role": "user", "content": "Hi"}]
    for prompt in ("Hi", turns, json.dumps(turns)):
        for completion in ("Hello.", [answer], answer, json.dumps([answer])):
            sample = one({"prompt": prompt, "completion": completion}, name)
            assert [(turn.role, turn.text, turn.learned) for turn in sample.turns] == [
                ("user", "Hi", False),
                ("assistant", "Hello.", True),
            ]
    words = one({"prompt": "[1, 2] + [3] = ?", "completion": "[1, 2, 3]"}, name)
    assert [turn.text for turn in words.turns] == ["[1, 2] + [3] = ?", "[1, 2, 3]"]
    prompt = [{"role": "system", "content": "Be kind."}, *two({})["messages"][:3]]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "second"}]}
    sample = one(row, name)
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert learned(sample) == ["second"], "what the assistant says in the prompt is no label"
    assert len(learned(one(row, name, learn="all"))) == 5
    with pytest.raises(DataError, match=r"field completion\[0\]\.role: role None"):
        one({"prompt": "Hi", "completion": [{"content": "Hello"}]}, name)
