"""Activations: what one forward keeps for its backward, counted in a forward on the meta device.

It is counted, not estimated by a formula: hooks see each tensor that autograd saves, with its shape, and nothing is computed.
Attention counts as a kernel that keeps its inputs, its output and one number per row and head (Dao et al. 2022,
arXiv 2205.14135), as those of GPUs do; with `model.attention: eager` the whole matrices count.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def activation_bytes(model: PreTrainedModel, rows: int, tokens: int, *, checkpointing: bool, eager: bool) -> int | None:
    """Bytes that the language model keeps for rows x tokens; None where its forward needs real numbers.

    The vision tower is not counted. checkpointing: inputs of all layers, and all of one layer, which is computed again.
    """
    language = language_model(model)
    layers = getattr(language, "layers", None)
    if language is None or layers is None:
        return None
    language.train()
    try:
        with torch.device("meta"), contextlib.nullcontext() if eager else _attention_as_on_gpus():
            kept = _kept_by_forward(language, rows, tokens)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        log.warning("activations are not known: %s", str(error).strip().partition("\n")[0])
        return None
    if not checkpointing:
        return kept
    inputs: int = len(layers) * rows * tokens * language.config.hidden_size * _dtype_of(language).itemsize
    return inputs + kept // len(layers)


def language_model(model: PreTrainedModel) -> PreTrainedModel | None:
    """The part that takes token embeddings and returns hidden states; None if the model has none of the usual form."""
    wanted = model.config.get_text_config().model_type
    for module in model.modules():
        is_base = isinstance(module, PreTrainedModel) and module.config.model_type == wanted
        if is_base and hasattr(module, "layers") and module.get_output_embeddings() is None:
            return module
    return None


def _kept_by_forward(language: PreTrainedModel, rows: int, tokens: int) -> int:
    weights = {parameter.untyped_storage()._cdata for parameter in language.parameters()}
    kept: dict[int, torch.Tensor] = {}  # the tensors, too: a storage that is gone may lend its number to another

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, tensor)
        return tensor

    embeddings = torch.empty(rows, tokens, language.config.hidden_size, dtype=_dtype_of(language), requires_grad=True)
    mask = torch.empty(
        1, 1, tokens, tokens, dtype=_dtype_of(language)
    )  # a whole one: to make it, numbers would be looked at
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        language(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _dtype_of(language: PreTrainedModel) -> torch.dtype:
    found: torch.dtype = next(parameter.dtype for parameter in language.parameters())
    return found


class _Attention(torch.autograd.Function):
    """A fused kernel's memory: on the meta device PyTorch would count the matrices of a plain computation."""

    @staticmethod
    def forward(context: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query: [B, heads, T, D]. The output's memory is laid out as [B, T, heads, D], as such kernels do."""
        rows, heads, tokens, _ = query.shape
        output = query.new_empty((rows, tokens, heads, value.shape[-1])).transpose(1, 2)
        context.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output


@contextlib.contextmanager
def _attention_as_on_gpus() -> Iterator[None]:
    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]

    real = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = real
