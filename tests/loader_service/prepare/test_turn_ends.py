"""loader-prepare says where a model would not learn to stop, and what happens to reasoning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loader_service.prepare.first_records import check_first_records
from loader_service.prepare.run import prepare
from stoker_proto.processor import Processor
from tests.proto.conftest import write_chat_folder
from tests.proto.text.chat_templates import CHATML, plain
from tests.proto.text.test_turn_ends import GLM
from tests.tiny_models import make_config, write_model_folder

SAID = [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": "42"}]


def check(tmp_path: Path, model: Path, rows: list[dict[str, Any]], *overrides: str, kind: str = "chat") -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(model, f"data.dataset_type={kind}", f"data.train_data_paths=[{shard}]", *overrides)
    check_first_records(config, prepare(config), Processor.build(config, None))


def test_a_template_without_an_end_of_turn_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write_chat_folder(tmp_path / "model", GLM, "causal")
    check(tmp_path, model, [{"messages": SAID}] * 5, "data.dialogue.template=chat_template")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "once per entry"
    assert "a.jsonl: the last learned token of a turn is '2' (20), so the model does not learn to stop" in said[0]
    assert "the chat template has no token that ends the assistant's turn" in said[0]
    assert "The model stops at '</s>'" in said[0]


@pytest.mark.parametrize(
    ("template", "overrides"),
    [(CHATML, ()), (CHATML, ("data.options.learn=all",)), (None, ()), (GLM, ("data.options.learn=all",))],
)
def test_turns_that_end_are_not_named(
    template: str | None, overrides: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """ChatML's end is no eos of the model: the export adds it."""
    if template is None:
        model = write_model_folder(tmp_path / "model", "causal")
    else:
        model = write_chat_folder(tmp_path / "model", plain(template), "causal")
        overrides = (*overrides, "data.dialogue.template=chat_template")
    check(tmp_path, model, [{"messages": SAID}], *overrides)
    assert [record.getMessage() for record in caplog.records] == []


@pytest.mark.parametrize(("end", "warned"), [(2, False), (7, False), (9, True)])
def test_token_ids_that_do_not_end_are_named(
    end: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_model_folder(tmp_path / "model", "causal")
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    rows = [{"input_ids": [5, 6, 300, end], "labels": [-100, -100, 300, end]}]
    check(tmp_path, model, rows, kind="text")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    if warned:
        assert "a.jsonl: the last token with a label is " in said[0]
        assert "(9), and the model stops at " in said[0]
        assert "or add 9 to eos_token_id in the model's generation_config.json" in said[0]


def test_plain_text_need_not_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = write_model_folder(tmp_path / "model", "causal")
    check(tmp_path, model, [{"text": "Once upon a time"}, {"input_ids": [5, 6, 300]}], kind="text")
    assert caplog.records == []


@pytest.mark.parametrize("validate", [False, True])
def test_reasoning_that_the_template_has_no_place_for_is_said(
    validate: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    thought = [SAID[0], {**SAID[1], "reasoning": "40 + 2"}]
    later = [{"role": "user", "content": "And 6 * 8?"}, {"role": "assistant", "content": "48"}]
    model = write_model_folder(tmp_path / "model", "causal")
    option = f"data.options.validate={str(validate).lower()}"
    check(tmp_path, model, [{"messages": [thought[0], {**thought[1], "weight": 0}, *later]}], option)
    warning = "a.jsonl: 1 records have reasoning beside the content of turns, and the template has no place for it"
    assert warning in caplog.text
    caplog.clear()
    check(tmp_path, model, [{"messages": thought}], option)
    assert warning in caplog.text
