"""The robot's state as words: openpi's bins, and where they stand in a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.actions.statistics import ActionStatistics, StatisticsAccumulator
from stoker_proto.errors import ConfigError, DataError, RowError
from stoker_proto.processor import Processor
from stoker_proto.text.state_text import StateText
from tests.proto.conftest import words
from tests.tiny_models import make_config, write_model_folder


def statistics(rows: np.ndarray) -> ActionStatistics:
    accumulator = StatisticsAccumulator(rows.shape[1])
    accumulator.add(rows, np.arange(len(rows), dtype=np.uint64))
    return accumulator.finish()[0]


LINEAR = statistics(
    np.stack([np.linspace(-1, 1, 101), np.linspace(0, 10, 101), np.full(101, 3.0)], axis=1).astype(np.float32)
)
"""Quantiles -0.98 and 0.98, 0.1 and 9.9; the third never moves."""


def test_bins_are_openpis() -> None:
    """Source of the expected numbers: openpi's formula, np.digitize(x, np.linspace(-1, 1, 257)[:-1]) - 1."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        normal = generator.uniform(-1, 1, 2)
        state = np.array([normal[0] * 0.98, 5 + normal[1] * 4.9, 3.0])
        expected = np.digitize(LINEAR.normalise(state)[:2], bins=np.linspace(-1, 1, 257)[:-1]) - 1
        assert StateText(LINEAR).write(state) == f"{expected[0]} {expected[1]} 128"
    assert StateText(LINEAR).write([-0.98, 9.9, 3]) == "0 255 128"
    assert StateText(LINEAR).write([-99, 99, 3]) == "0 255 128"


def test_what_is_no_state() -> None:
    with pytest.raises(DataError, match=r"a state of shape \[2\]: 3 numbers are expected"):
        StateText(LINEAR).write([0, 1])
    with pytest.raises(DataError, match="the state holds nan: finite numbers"):
        StateText(LINEAR).write([0, np.nan, 1])


OPENPI = 'data.dialogue.user="Task: {instruction}, State: {state};\\nAction: "'


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "<s><|User|> <image>x16 Task: push the {state}, State: 128 0 128; <|Assistant|>"),
        (
            ["data.dialogue.template=chat_template"],
            "<s><|User|> <image>x16 Task: push the {state}, State: 128 0 128; <|Assistant|>",
        ),
        (
            [
                "data.dialogue.template=custom",
                'data.dialogue.user="{image}Task: {instruction}, State: {state};\\nAction: "',
            ],
            "<s><image>x16Task: push the {state}, State: 128 0 128;\nAction: ",
        ),
    ],
)
def test_where_it_stands(overrides: list[str], expected: str, tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    config = make_config(tmp_path, "data.state=text", *overrides)
    processor = Processor.build(config, None, LINEAR)
    state = np.array([0.005, 0.0, 3.0], np.float32)
    prompt = processor.prompt("push the {state}", 1, state)
    assert words(processor, prompt).replace("<image>" * 16, "<image>x16") == expected
    row = processor.encode("push the {state}", 1, answer="ok", state=state)
    assert row.input_ids[: len(prompt)].tolist() == prompt.tolist()
    other = processor.prompt("push the {state}", 1, np.array([0.5, 0, 3], np.float32))
    assert other.tolist() != prompt.tolist()
    processor.save(tmp_path / "saved")
    loaded = Processor.load(tmp_path / "saved")
    assert loaded.prompt("push the {state}", 1, state).tolist() == prompt.tolist()
    assert loaded.fingerprints() == processor.fingerprints()
    with pytest.raises(RowError, match=r"data.state is text, and a sample has no state"):
        processor.prompt("push", 1)
    with pytest.raises(RowError, match=r"its statistics are not known; run loader-prepare"):
        Processor.build(config, None).prompt("push", 1, state)


def test_fingerprints_tell_states_apart(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    none = Processor.build(make_config(tmp_path), None, LINEAR)
    text = Processor.build(make_config(tmp_path, "data.state=text"), None, LINEAR)
    other = Processor.build(make_config(tmp_path, "data.state=text"), None, statistics(np.eye(3, dtype=np.float32)))
    assert none.fingerprints()["state"] == "none"
    assert none.fingerprints()["dialogue"] != text.fingerprints()["dialogue"] == other.fingerprints()["dialogue"]
    assert text.fingerprints()["state"] != other.fingerprints()["state"]
    assert none.prompt("push", 1, np.zeros(3)).tolist() == none.prompt("push", 1).tolist()


def test_a_processor_from_before_states_is_read(tmp_path: Path) -> None:
    write_model_folder(tmp_path)
    processor = Processor.build(make_config(tmp_path), None)
    tree = json.loads(processor.to_json())
    for name in ("overlong", "needs_state", "state"):
        del tree[name]
    again = Processor.from_json(json.dumps(tree), tmp_path / "tokenizer.json")
    assert again.to_json() == processor.to_json()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.state=text", "data.dialogue.template=openvla"], "openvla, which has no place for it"),
        (
            ["data.state=text", "data.dialogue.template=custom", "data.dialogue.user='{instruction}'"],
            r"\{state\} stands in it with",
        ),
        (["data.dialogue.template=custom", OPENPI], r"\{state\} stands in it with data.state=text, and only then"),
    ],
)
def test_templates_that_do_not_go_with_it(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(write_model_folder(tmp_path), *overrides)
