"""`model.attention` reaches the model, and what cannot work is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker_proto.errors import ConfigError
from tests.trainer.support.memory import make_config
from trainer.models.families import family_of, read_model_config
from trainer.models.loading import load_model

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
