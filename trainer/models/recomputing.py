"""Gradient checkpointing: layers keep their inputs only, and compute the rest again in the backward pass.

PyTorch's reentrant kind gives a layer's weights no gradient, and says nothing, unless one of the layer's inputs has one. Behind
frozen embeddings (adapters, `model.freeze`) none has. transformers lets the embeddings' outputs have a gradient, which misses
models that read the embedding's weight themselves (the vision tower of Qwen3-VL). So here the layer's own input gets one, where
the layer is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from stoker_proto.errors import ConfigError


def recompute_layers(model: PreTrainedModel) -> None:
    """Let the model's layers compute their activations again. Call it when it is decided what is trained. Raises ConfigError."""
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"model.gradient_checkpointing is true, and {type(model).__name__} cannot compute its activations again: set it to "
            "false"
        )
    # Reentrant: under ZeRO-3 a non-reentrant recomputation finds parameters of another shape than it saved.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for module in model.modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None:
            module._gradient_checkpointing_func = _with_gradient(checkpoint, module)


def _with_gradient(checkpoint: Callable[..., Any], layer: torch.nn.Module) -> Callable[..., Any]:
    """`checkpoint` for a layer whose inputs may have no gradient."""
    is_trained = any(parameter.requires_grad for parameter in layer.parameters())

    def call(function: Callable[..., Any], *inputs: Any) -> Any:
        numbers = [n for n, value in enumerate(inputs) if torch.is_tensor(value) and value.is_floating_point()]
        if not torch.is_grad_enabled() or any(inputs[n].requires_grad for n in numbers):
            return checkpoint(function, *inputs)
        if not is_trained:
            return function(*inputs)  # nothing is kept for a backward pass
        if not numbers:
            raise ConfigError(
                f"model.gradient_checkpointing is true, and {type(layer).__name__} gets its hidden states by name, so that its "
                "weights would have no gradient: set it to false"
            )
        given = list(inputs)
        given[numbers[0]] = given[numbers[0]].detach().requires_grad_()
        return checkpoint(function, *given)

    return call
