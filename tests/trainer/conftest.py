"""Small models, built once per session."""

from __future__ import annotations

from pathlib import Path

import pytest


def _build(family: str, factory: pytest.TempPathFactory) -> Path:
    from trainer.models.tiny import build_tiny

    folder = factory.mktemp("models") / family
    build_tiny(family, folder, image_size=64)
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA of a million parameters, 16 tokens per image of 64 x 64."""
    return _build("llava", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An Idefics3 of a million parameters."""
    return _build("idefics3", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model of a million parameters."""
    return _build("causal", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_openvla(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OpenVLA of a million parameters, 16 patches per image of 64 x 64."""
    return _build("openvla", tmp_path_factory)


@pytest.fixture(scope="session")
def tied_causal(tiny_causal: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text model whose input and output embeddings are one matrix."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tied") / "model"
    config = transformers.AutoConfig.from_pretrained(tiny_causal, tie_word_embeddings=True)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_causal).save_pretrained(folder)
    return folder
