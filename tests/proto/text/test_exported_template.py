"""What `auto` takes, and the chat template of an export: transformers writes with it the prompt and the row that were trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from stoker_proto.text.turns import Turn
from tests.proto.conftest import write_chat_folder
from tests.proto.images.test_openvla import write_published_folder
from tests.proto.text.chat_templates import CHATML, plain
from tests.tiny_models import make_config
from trainer.checkpoints.export import write_chat_template

transformers = pytest.importorskip("transformers")
CUSTOM = ("data.dialogue.template=custom", "data.dialogue.user='Q {image} {instruction}: '")
TEMPLATES = {
    "own": ("data.dialogue.template=auto",),
    "stoker": ("data.dialogue.template=stoker",),
    "openvla": ("data.dialogue.template=openvla",),
    "custom": CUSTOM,
}


def exported(folder: Path, processor: Processor) -> Any:
    """transformers' tokenizer of the base model's folder with the exported template."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "old"}))
    (folder / "chat_template.jinja").unlink()
    write_chat_template(folder, processor.chat_template())
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.long
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("family", ["causal", "llava"])
def test_an_export_is_asked_as_it_was_trained(name: str, family: str, tmp_path: Path) -> None:
    """An instruct model with ChatML, fine-tuned with each template."""
    folder = write_chat_folder(tmp_path, plain(CHATML), family)
    processor = Processor.build(make_config(folder, *TEMPLATES[name]), None)
    tokenizer = exported(folder, processor)

    def ids(messages: list[dict[str, Any]], opening: bool) -> list[int]:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=opening, tokenize=True, return_dict=True)
        return list(found["input_ids"])

    user = {"role": "user", "content": "Push the Cube"}
    assert ids([user], True) == processor.prompt("Push the Cube", 0).tolist()
    row = processor.encode("Push the Cube", 0, answer="Done").input_ids.tolist()
    answered = ids([user, {"role": "assistant", "content": "Done"}], False)
    assert answered[: len(row)] == row or name == "own"
    if name == "stoker":
        turns = [
            Turn(role=role, text=role, learned=role == "assistant") for role in ("system", "user", "assistant") * 2
        ]  # type: ignore[arg-type]
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        expected = processor.encode_turns(turns)
        found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert list(found["input_ids"]) == expected.input_ids.tolist()
        assert list(found["assistant_masks"]) == expected.supervised.tolist()
    if family == "llava" and name != "own":
        shown = [{"type": "image"}, {"type": "text", "text": "Push the Cube"}]
        once = ids([{"role": "user", "content": shown}], True)
        image = processor.image_token_id
        repeated = [token for number in once for token in [number] * (16 if number == image else 1)]
        assert repeated == processor.prompt("Push the Cube", 1).tolist()


def test_an_export_sets_the_options_that_were_trained(tmp_path: Path) -> None:
    source = plain(CHATML) + "{{ '[brief]' if brief else '[long]' }}"
    folder = write_chat_folder(tmp_path, source)
    options = "data.dialogue.template_options={brief: true, date: 2025-06-30}"
    tokenizer = exported(folder, Processor.build(make_config(folder, "data.dialogue.template=auto", options), None))
    user = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(user, tokenize=False).endswith("[brief]")
    assert tokenizer.apply_chat_template(user, tokenize=False, brief=False).endswith("[long]")


@pytest.mark.long
def test_auto_is_the_models_own_template_or_ours(tmp_path: Path) -> None:
    def template(folder: Path, *overrides: str) -> str:
        processor = Processor.build(make_config(folder, "data.dialogue.template=auto", *overrides), None)
        return str(json.loads(processor.to_json())["dialogue"]["template"])

    folder = write_chat_folder(tmp_path, plain(CHATML))
    assert template(folder) == "chat_template"
    named = Processor.build(make_config(folder, "data.dialogue.template=chat_template"), None)
    auto = Processor.build(make_config(folder, "data.dialogue.template=auto"), None)
    assert auto.fingerprints() == named.fingerprints()
    assert (
        auto.fingerprints()
        != Processor.build(make_config(folder, "data.dialogue.template=stoker"), None).fingerprints()
    )
    (folder / "chat_template.jinja").unlink()
    assert template(folder) == "stoker"
    folder = tmp_path / "openvla"
    folder.mkdir()
    write_published_folder(folder)
    assert template(folder) == "openvla"
    with pytest.raises(ConfigError, match=r"template auto is openvla for this model, which has no place for it"):
        template(folder, "data.state=text")
