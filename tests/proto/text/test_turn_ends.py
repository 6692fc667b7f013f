"""The tokens that end learned turns, for templates as models have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.model_folder import ModelFolder
from stoker_proto.processor import Processor
from tests.proto.text.chat_templates import CHATML, LLAMA_2, LLAMA_3, QWEN, REASONING, ZEPHYR, plain, tagged
from tests.tiny_models import make_config, write_model_folder

GLM = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""GLM's way: a turn ends where the next one begins."""
TWO_ENDS = CHATML.replace("'<|im_end|>' }}>>", "('<|eot_id|>' if loop.last else '<|im_end|>') }}>>")
"""gpt-oss's way: the last turn ends with another token than those before it."""


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["<|im_end|>"]),
        (LLAMA_2, []),
        (LLAMA_3, ["<|eot_id|>"]),
        (QWEN, ["<|im_end|>"]),
        (REASONING, ["<|im_end|>"]),
        (ZEPHYR, []),
    ],
)
@pytest.mark.parametrize("form", [plain, tagged])
def test_a_templates_ends_are_found(
    template: str, ends: list[str], form: Callable[[str], str], chat_processor: Callable[..., Processor]
) -> None:
    processor = chat_processor(form(template), max_seq_len=4)
    found = processor.turn_ends
    names = processor.token_texts(np.array(found.ids))
    assert sorted(names) == sorted([*ends, "</s>"]), "the tokenizer's own end is always one"
    assert found.words == ()


def test_earlier_turns_may_end_otherwise(chat_processor: Callable[..., Processor]) -> None:
    processor = chat_processor(tagged(TWO_ENDS))
    names = processor.token_texts(np.array(processor.turn_ends.ids))
    assert sorted(names) == ["</s>", "<|eot_id|>", "<|im_end|>"]


def test_a_template_without_an_end_of_turn_is_seen(chat_processor: Callable[..., Processor]) -> None:
    processor = chat_processor(GLM)
    assert processor.turn_ends.ids == (processor.end_id,)
    assert len(processor.turn_ends.words) == 1


def test_other_templates_end_with_the_end_token(tmp_path: Path) -> None:
    for template in ("stoker", "openvla"):
        config = make_config(write_model_folder(tmp_path, "causal"), f"data.dialogue.template={template}")
        processor = Processor.build(config, None)
        assert processor.turn_ends.ids == (processor.end_id,)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 5]}, {"eos_token_id": 2}, (5, 7)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({"bos_token_id": 1}, {"eos_token_id": 2}, (2,)),
        (None, {"text_config": {"eos_token_id": 3}}, (3,)),
        (None, {}, ()),
    ],
)
def test_where_a_model_stops(
    generation: dict[str, object] | None, config: dict[str, object], expected: tuple[int, ...], tmp_path: Path
) -> None:
    folder = write_model_folder(tmp_path, "causal", config=config)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert ModelFolder(folder).stop_ids() == expected
