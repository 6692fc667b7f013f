"""An exported model stops at the tokens that end learned turns."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from trainer.checkpoints.export import add_stop_ids
from trainer.models.tiny import build_tiny


def test_generation_stops_at_the_added_tokens(tmp_path: Path) -> None:
    build_tiny("causal", tmp_path)
    prompt = torch.tensor([[1, 300, 301]])

    def generated() -> list[int]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        return out[0, 3:].tolist()  # type: ignore[no-any-return]

    before = generated()
    old = GenerationConfig.from_pretrained(tmp_path)
    assert len(before) == 12
    assert old.eos_token_id not in before
    stop = before[5]
    add_stop_ids(tmp_path, [old.eos_token_id, stop])
    new = GenerationConfig.from_pretrained(tmp_path)
    assert new.eos_token_id == [old.eos_token_id, stop]
    assert (new.bos_token_id, new.pad_token_id) == (old.bos_token_id, old.pad_token_id)
    assert generated() == before[: before.index(stop) + 1]


def test_known_tokens_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "generation_config.json"
    file.write_text('{"eos_token_id": [7, 5]}')
    add_stop_ids(tmp_path, [5])
    assert file.read_text() == '{"eos_token_id": [7, 5]}'
    add_stop_ids(tmp_path, [5, 9])
    assert json.loads(file.read_text()) == {"eos_token_id": [5, 7, 9]}
    file.unlink()
    add_stop_ids(tmp_path, [5])
    assert not file.exists(), "a model that cannot generate"


def test_a_stop_of_the_config_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 3}}')
    (tmp_path / "generation_config.json").write_text('{"pad_token_id": 0}')
    add_stop_ids(tmp_path, [8])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [3, 8], "pad_token_id": 0}
