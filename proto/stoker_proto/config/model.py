"""`model`: what is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stoker_proto.config.rules import above, allowed, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (LoRA): the base model's weights stay as they are, two small matrices beside each target are trained."""

    rank: int = field(default=16, metadata=at_least(1))
    """Rank of the two matrices."""
    alpha: float = field(default=32.0, metadata=above(0))
    """The adapter's product counts alpha / rank times."""
    dropout: float = field(default=0.0, metadata=allowed("it must lie in [0, 1)", lambda share: 0 <= share < 1))
    """Dropout in front of the adapters."""
    targets: tuple[str, ...] = field(default=("auto",), metadata=allowed("name a layer at least, or auto", bool))
    """`auto`: all linear layers of the language model but its head. Or names of linear layers, or their last parts:
    `[q_proj, v_proj]`."""
    export: Literal["merged", "adapter"] = "merged"
    """`merged`: a whole model with the adapters added to its weights; `adapter`: the adapters alone, which peft and transformers
    load onto the base model. Policies and evaluation need a whole model."""


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
    attention: Literal["auto", "sdpa", "flash", "eager"] = "auto"
    """Implementation of attention. `auto`: transformers' choice, mostly PyTorch's `sdpa`; `flash`: the package flash-attn, for
    GPUs and bf16; `eager`: plain matrices, slow, for comparisons. Packed rows (`data.packing`) take a dense mask [rows, 1, T, T]
    with `sdpa`, and none with `flash`."""
    lora: LoraConfig | None = None
    """Train adapters (extra `stoker[lora]`); null: train the model's own weights. A checkpoint holds the adapters only."""
    freeze: tuple[str, ...] = ()
    """Parameters that are not trained, as patterns of their names: `["*vision_tower*", "lm_head.*"]`. Not with `lora`."""
    trust_remote_code: bool = False
    """Run Python code from the model folder. Leave it off unless you have read that code."""
