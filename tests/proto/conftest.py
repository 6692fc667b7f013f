"""Processors of a small text model with a chat template, and transformers' tokenizer of the same folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stoker_proto.processor import Processor
from tests.proto.text.chat_templates import PLAIN_TOKENS, TOKENS
from tests.tiny_models import IDEFICS_TOKENS, make_config, write_model_folder
from trainer.models.tiny_tokenizer import build_tokenizer

_JSON: dict[str, str] = {}


def write_chat_folder(folder: Path, template: str, family: str = "causal") -> Path:
    """A model's folder with this chat template and a tokenizer that has the tokens of our templates."""
    if "json" not in _JSON:
        tokenizer = build_tokenizer((*IDEFICS_TOKENS, *TOKENS))
        tokenizer.add_tokens(list(PLAIN_TOKENS))
        _JSON["json"] = tokenizer.to_str()
    write_model_folder(folder, family)
    (folder / "tokenizer.json").write_text(_JSON["json"])
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture
def chat_processor(tmp_path: Path) -> Callable[..., Processor]:
    """`chat_processor(template, "data.overlong=truncate", max_seq_len=64)`: of a folder below tmp_path."""

    def make(template: str, *overrides: str, max_seq_len: int = 4096, family: str = "causal") -> Processor:
        folder = write_chat_folder(tmp_path / f"model-{len(list(tmp_path.iterdir()))}", template, family)
        config = make_config(folder, "data.dialogue.template=chat_template", *overrides, max_seq_len=max_seq_len)
        return Processor.build(config, None)

    return make


def words(processor: Processor, ids: Any) -> str:
    """The text of token ids, special tokens included."""
    text: str = processor._tokenizer.tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)
    return text
