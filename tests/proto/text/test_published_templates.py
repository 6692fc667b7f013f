"""The published forms of ten model families: ids and labels are those of transformers' own `apply_chat_template`."""

from __future__ import annotations

import datetime
import itertools
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest

from stoker_proto.errors import DataError, RowError
from stoker_proto.processor import EncodedRow, Processor
from stoker_proto.text.chat_rows import DialogueSample
from stoker_proto.text.turn_ends import last_learned
from stoker_proto.text.turns import Call, Turn
from tests.proto.text.published_templates import PUBLISHED, Published
from tests.tiny_models import make_config, write_model_folder
from trainer.models.tiny_tokenizer import build_tokenizer

transformers = pytest.importorskip("transformers")

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find_cube",
            "description": "Find a cube",
            "parameters": {"type": "object", "properties": {"colour": {"type": "string", "description": "its colour"}}},
        },
    }
]
HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures "
    "within <tools></tools> XML tags:\n<tools>\n"
    + json.dumps(TOOLS[0])
    + "\n</tools>\n\nFor each function call, return a json "
    "object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
HERMES_CALL = '<tool_call>\n{"name": "find_cube", "arguments": {"colour": "red"}}\n</tool_call>'
REFUSED = {
    # The template drops the turns of tools without a word.
    (
        "phi-3",
        "used",
    ): "leaves out turn 2, which is the tool's|leaves out turn 3, which is the tool's|leaves out turn 4",
    # The system text stands in front of the last turn only where that is the user's.
    ("mistral-v3", "used, system"): "leaves out turn 0, which is the system's",
    # They write the call only, and leave out the text beside it.
    ("llama-3.1", "used, reasoning"): "changes what turn",
    ("mistral-v3", "used, reasoning"): "changes what turn",
    # Its template has no reasoning, and cuts what stands before </think>.
    ("deepseek-v3.1", "reasoning"): "changes what turn",
}


def write_folder(folder: Path, published: Published) -> Path:
    tokenizer = build_tokenizer(published.special)
    tokenizer.add_tokens(list(published.added))
    write_model_folder(folder, "causal")
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "chat_template.jinja").write_text(published.source)
    return folder


def make(folder: Path, published: Published, *overrides: str, max_seq_len: int = 1 << 16) -> Processor:
    options = [f"data.dialogue.template_options={published.options}"] if published.options else []
    config = make_config(
        write_folder(folder, published), "data.dialogue.template=auto", *options, *overrides, max_seq_len=max_seq_len
    )
    return Processor.build(config, None)


def dialogue(exchanges: int, *, system: bool, tools: str, reasoning: bool) -> DialogueSample:
    """tools: "none", "defined", or "used": then each answer comes after a call and its result."""
    turns = [Turn(role="system", text="Be kind.")] if system else []
    for number in range(exchanges):
        why = f"Is it red {number}?" if reasoning else None
        turns.append(Turn(role="user", text=f"Where is the cube {number}?"))
        if tools == "used":
            call = Call("find_cube", {"colour": "red"}, f"callabcd{number}")
            turns.append(Turn(role="assistant", text="", reasoning=why, calls=(call,), learned=True))
            turns.append(Turn(role="tool", text=f"x = {number}\ny = 2", call_id=call.id))
        turns.append(Turn(role="assistant", text=f"It is there {number}.", reasoning=why, learned=True))
    return DialogueSample(turns, 0, () if tools == "none" else TOOLS)


ENDS = {
    "mistral-v3": ("[/INST]", "[/TOOL_RESULTS]"),  # the system text stands in the prompt only
    "gpt-oss": ('y = 2"<|end|><|start|>assistant',),  # the reasoning of a call goes once there is an answer
}
"""How the prompts end whose history the template changes when the answer is there."""


class Oracle:
    """transformers, and the rows that its texts make."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.published = name, PUBLISHED[name]
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(write_folder(folder, self.published))

    def messages(self, sample: DialogueSample) -> list[dict[str, Any]]:
        """As their users write them; functions and reasoning as text where the template has no form for them."""
        native, found = self.published.writes_functions, []
        for turn in sample.turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.text}
            if turn.reasoning and self.published.writes_reasoning:
                message["reasoning_content"] = turn.reasoning
            elif turn.reasoning:
                message["content"] = f"<think>\n{turn.reasoning}\n</think>\n\n{turn.text}"
            if turn.calls and native:
                arguments: Any = '{"colour": "red"}' if self.name.startswith("deepseek") else {"colour": "red"}
                function = {"name": "find_cube", "arguments": arguments}
                message["tool_calls"] = [{"type": "function", "id": turn.calls[0].id, "function": function}]
            elif turn.calls:
                message["content"] = "\n".join(filter(None, (message["content"], HERMES_CALL)))
            if turn.call_id:
                message["tool_call_id"] = turn.call_id
            found.append(message)
        if sample.tools and not native:
            if found[0]["role"] == "system":
                found[0]["content"] += f"\n\n{HERMES}"
            else:
                found.insert(0, {"role": "system", "content": HERMES})
        return found

    def text(self, messages: list[dict[str, Any]], tools: bool, opening: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tools=TOOLS if tools and self.published.writes_functions else None,
                add_generation_prompt=opening,
                tokenize=False,
            )
        )

    def rows(self, sample: DialogueSample) -> list[tuple[list[int], list[int]]]:
        """(ids, labels): by the difference of the text up to each answer and its prompt; one row for all answers that fit it."""
        messages, tools = self.messages(sample), bool(sample.tools)
        answers = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, whole = self.text(messages[:i], tools, True), self.text(messages[: i + 1], tools, False)
                if not whole.startswith(prompt):  # the turns before are written otherwise once the answer is there
                    [end] = [end for end in ENDS[self.name] if prompt.endswith(end)]
                    whole = prompt + whole.rpartition(end)[2]
                answers.append((prompt, whole))
        rows = []
        while answers:
            text = answers[-1][1]
            ends = {
                i: whole.removesuffix("</s>") if self.name == "phi-3" else whole for i, (_, whole) in enumerate(answers)
            }
            ends[len(answers) - 1] = text
            inside = [
                i for i, (prompt, _) in enumerate(answers) if text.startswith(ends[i]) and text.startswith(prompt)
            ]
            spans = [(len(answers[i][0]), len(ends[i].rstrip())) for i in inside]
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            labels = [int(any(a < end and start < b for a, b in spans)) for start, end in encoding["offset_mapping"]]
            rows.insert(0, (list(encoding["input_ids"]), labels))
            answers = [answer for i, answer in enumerate(answers) if i not in inside]
        return rows


@pytest.fixture
def fixed_day(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers has no option for it."""

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return cls(2025, 6, 30)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Day)


def as_lists(rows: list[EncodedRow]) -> list[tuple[list[int], list[int]]]:
    return [(row.input_ids.tolist(), row.supervised.tolist()) for row in rows]


@pytest.mark.long
@pytest.mark.usefixtures("fixed_day")
@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_and_labels_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """1 to 4 exchanges, with and without a system turn, functions and reasoning."""
    theirs, processor = Oracle(tmp_path / "theirs", name), make(tmp_path / "ours", PUBLISHED[name])
    compared = 0
    grid = itertools.product((1, 2, 3, 4), (False, True), ("none", "defined", "used"), (False, True))
    for exchanges, system, tools, reasoning in grid:
        sample = dialogue(exchanges, system=system, tools=tools, reasoning=reasoning)
        [found] = processor.encode_dialogues([sample])
        case = (name, exchanges, system, tools, reasoning)
        reasons = [
            reason
            for (of, what), reason in REFUSED.items()
            if of == name and set(what.split(", ")) <= {tools, "reasoning" * reasoning, "system" * system}
        ]
        if reasons:
            assert isinstance(found, RowError), case
            assert any(part in str(found) for reason in reasons for part in reason.split("|")), found
            continue
        if isinstance(found, DataError):
            with pytest.raises(jinja2.TemplateError) as raised:
                theirs.rows(sample)
            assert str(raised.value) in str(found), case
            continue
        expected = theirs.rows(sample)
        assert as_lists(found) == expected, case
        compared += 1
    assert compared == COMPARED[name]


COMPARED = {
    "chatml": 48,
    "llama-3.1": 40,
    "qwen-2.5": 48,
    "qwen-3": 48,
    "gemma": 8,
    "mistral-v3": 36,
    "mistral-small-3": 32,
    "phi-3": 32,
    "deepseek-v3": 48,
    "deepseek-v3.1": 24,
    "glm-4.5": 48,
    "gpt-oss": 48,
}


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("gpt-oss", ["</s>", "<|call|>", "<|return|>"]),
        ("llama-3.1", ["</s>", "<|eot_id|>"]),
        ("qwen-3", ["</s>", "<|im_end|>"]),
        ("glm-4.5", ["</s>"]),  # a turn has no end, and a call is not one: another may follow it
    ],
)
def test_the_end_of_a_call_is_an_end_too(name: str, ends: list[str], tmp_path: Path) -> None:
    """The exported model must stop there, or it would write what the function answers."""
    processor = make(tmp_path, PUBLISHED[name])
    assert sorted(processor.token_texts(np.array(processor.turn_ends.ids))) == ends


def test_a_call_ends_otherwise_with_tools_of_llamas_own(tmp_path: Path) -> None:
    """Llama 3.1 waits for the answer behind <|eom_id|>, once the template is given `builtin_tools`."""
    options = "data.dialogue.template_options={builtin_tools: [brave_search]}"
    processor = make(tmp_path, PUBLISHED["llama-3.1"], options)
    assert sorted(processor.token_texts(np.array(processor.turn_ends.ids))) == ["</s>", "<|eom_id|>", "<|eot_id|>"]
    [[row]] = processor.encode_dialogues([dialogue(1, system=False, tools="used", reasoning=False)])
    ends = [int(row.input_ids[at]) for at in last_learned(row.supervised)]
    assert processor.token_texts(np.array(ends)) == ["<|eom_id|>", "<|eot_id|>"]
