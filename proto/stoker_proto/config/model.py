"""`model`: what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    base_model_path: str
    """Folder of a model that transformers' Auto classes load, or the id of a model on the hub that was downloaded before
    (`hf download openvla/openvla-7b`). Loaders read its `tokenizer.json`, too."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of the forward and backward pass."""
    trust_remote_code: bool = False
    """Run Python code from the model folder. Leave it off unless you have read that code."""
