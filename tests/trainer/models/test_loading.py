"""`model.attention` reaches the model, and what cannot work is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stoker_proto.config import ActionConfig, LoraConfig
from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config, make_processor
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
