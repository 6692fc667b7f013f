"""`model.attention` reaches the model, and what cannot work is refused before anything is loaded."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stoker_proto.config import ActionConfig, LoraConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config, make_processor
from trainer.engine.weight_files import check_files, shapes_in
from trainer.engine.zero_stage import count_weights
from trainer.models.families import family_of, read_model_config
from trainer.models.loading import check_new_tokens, load_model

PLAIN = {"zero_optimization": {"stage": 0}}


@pytest.mark.parametrize(("attention", "expected"), [("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")])
def test_attention_is_what_the_config_says(attention: str, expected: str, tiny_causal: Path, tmp_path: Path) -> None:
    config = make_config(tiny_causal, tmp_path, attention=attention)
    model = load_model(config, family_of(read_model_config(str(tiny_causal))), PLAIN, 0)
    assert model.config._attn_implementation == expected


@pytest.mark.parametrize(
    ("precision", "gpu", "message"),
    [
        ("fp32", True, "computes in bf16 only"),
        ("bf16", False, "needs a GPU"),
        (
            "bf16",
            True,
            "flash-attn, which is not installed: pip install flash-attn --no-build-isolation, or take auto or sdpa",
        ),
    ],
)
def test_flash_attention_that_cannot_work_is_refused(
    precision: str, gpu: bool, message: str, tiny_causal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = make_config(tiny_causal, tmp_path, attention="flash", precision=precision)
    with pytest.raises(ConfigError, match=message):
        load_model(config, family_of(read_model_config(str(tiny_causal))), PLAIN, 0)


@pytest.mark.parametrize(
    ("keys", "frozen"),
    [
        ({"lora": LoraConfig(rank=2)}, "input embeddings and the head"),
        ({"freeze": ("*embed_tokens*",)}, "input embeddings"),
        ({"freeze": ("lm_head.*",)}, "head"),
        ({}, ""),
    ],
)
def test_new_tokens_are_refused_where_their_rows_are_not_trained(
    keys: dict[str, Any], frozen: str, tiny_causal: Path, tmp_path: Path
) -> None:
    """Also where the embeddings had room for them, so that nothing has to grow."""
    action = ActionConfig(codec="bins", vocabulary="added", codec_options={"num_bins": 16})
    config = make_config(tiny_causal, tmp_path, data={"action": action}, **keys)
    model_config, processor = read_model_config(str(tiny_causal)), make_processor(config)
    assert processor.vocab_size_needed <= model_config.vocab_size, "nothing grows"
    model = load_model(config, family_of(model_config), PLAIN, processor.vocab_size_needed)
    if not frozen:
        return check_new_tokens(model, processor.vocabulary)
    with pytest.raises(
        ConfigError, match=rf"vocabulary is added, .* leaves the {frozen} as they are, so the new tokens"
    ):
        check_new_tokens(model, processor.vocabulary)
    return check_new_tokens(model, make_processor(make_config(tiny_causal, tmp_path)).vocabulary)


def test_a_frozen_head_is_named_where_its_weights_are_the_embeddings(
    tied_causal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tied_causal, tmp_path, freeze=("*embed_tokens*",))
    load_model(config, family_of(read_model_config(str(tied_causal))), PLAIN, 0)
    assert "the head is frozen, too, as its weights are the input embeddings" in caplog.text


def damaged(tiny_causal: Path, tmp_path: Path, change: Callable[[Path], object]) -> str:
    """What `load_model` says of a copy of the model that was changed so."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_causal, folder)
    change(folder)
    with pytest.raises(ConfigError) as caught:
        load_model(make_config(folder, tmp_path), family_of(read_model_config(str(folder))), PLAIN, 0)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def rename(folder: Path, change: Callable[[str], str | None]) -> None:
    """Give the weights other names; None: leave one out."""
    weights = load_file(folder / "model.safetensors")
    kept = {new: weight for name, weight in weights.items() if (new := change(name)) is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_not_there_are_not_made_up(tiny_causal: Path, tmp_path: Path) -> None:
    """transformers would begin with random ones, and say so in a table."""
    said = damaged(tiny_causal, tmp_path, lambda folder: rename(folder, lambda name: f"module.{name}"))
    assert re.search(
        r"it lacks (\d+) of the model's \1 weights, such as .*it has \d+ that the model does not know", said
    )
    assert "such as module." in said
    said = damaged(
        tiny_causal, tmp_path / "b", lambda folder: rename(folder, lambda name: None if "layers.1." in name else name)
    )
    assert "of the model's" in said
    assert "such as model.layers.1." in said


def test_weights_of_other_shapes_or_cut_short_are_named(tiny_causal: Path, tmp_path: Path) -> None:
    def widen(folder: Path) -> None:
        tree = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**tree, "intermediate_size": 2 * tree["intermediate_size"]}))

    assert "its weights have other shapes than its config.json says" in damaged(tiny_causal, tmp_path, widen)

    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])

    assert "the model cannot be loaded: " in damaged(tiny_causal, tmp_path / "b", cut)
    folder = tmp_path / "b" / "model"
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: not a safetensors file \(\d+ bytes, and its header promises"
    ):
        check_files(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n")
    with pytest.raises(
        ConfigError, match=r"model\.safetensors: a Git LFS pointer, not the file itself: run `git lfs pull`"
    ):
        check_files(folder)
    check_files(tiny_causal)
    assert sum(map(math.prod, shapes_in(tiny_causal / "model.safetensors"))) == count_weights(tiny_causal)
