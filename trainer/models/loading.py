"""Folder -> model, ready for the engine: partitioned under ZeRO-3, with embedding rows for added tokens."""

from __future__ import annotations

import logging
from typing import Any

import deepspeed
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError
from stoker_proto.host.hub_cache import find_model_folder
from trainer.engine.zero import partitioned_loading
from trainer.models.families import Family, check_forward

log = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()  # one per rank, for seconds of loading


def load_model(config: Config, family: Family, settings: dict[str, Any], vocab_size_needed: int) -> PreTrainedModel:
    """The base model in `model.precision`, on the CPU or partitioned. Raises ConfigError."""
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    folder = str(find_model_folder(config.model.base_model_path))
    with partitioned_loading(settings):
        try:
            model: PreTrainedModel = family.auto_class.from_pretrained(
                folder, dtype=dtype, trust_remote_code=config.model.trust_remote_code, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"model.base_model_path is {folder!r}: the model cannot be loaded: {first_line}"
            ) from error
        grow_embeddings(model, vocab_size_needed)
    if hasattr(model, "freeze_unused"):  # afterwards, as loading makes parameters anew
        model.freeze_unused()
    check_forward(model, family, packing=config.data.packing)
    if config.model.gradient_checkpointing:
        # Reentrant: under ZeRO-3 a non-reentrant recomputation finds parameters of another shape than it saved.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    return model


def text_width(model_config: PretrainedConfig) -> int:
    """Width of the language model's hidden states."""
    return int(model_config.get_text_config().hidden_size)


def grow_embeddings(model: PreTrainedModel, vocab_size_needed: int) -> None:
    """Add embedding rows up to vocab_size_needed, each the mean of the old rows: deterministic, the same on every rank.

    Does nothing if the matrices are large enough (they are often padded beyond the tokenizer's vocabulary).
    """
    old_size = true_shape(model.get_input_embeddings().weight)[0]
    if vocab_size_needed <= old_size:
        return
    log.info("embeddings grow from %d to %d rows", old_size, vocab_size_needed)
    model.resize_token_embeddings(vocab_size_needed, mean_resizing=False)
    output = model.get_output_embeddings()
    layers = [model.get_input_embeddings()] + ([output] if output is not None else [])
    parameters = list({id(layer.weight): layer.weight for layer in layers}.values())  # a single one if they are tied
    biases = [layer.bias for layer in layers if getattr(layer, "bias", None) is not None]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(parameters + biases, modifier_rank=0):
        for parameter in parameters:
            parameter[old_size:] = parameter[:old_size].float().mean(dim=0).to(parameter.dtype)
        for bias in biases:
            bias[old_size:] = bias[:old_size].float().mean().to(bias.dtype)


def true_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of a parameter, also if ZeRO-3 has left an empty placeholder of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def count_parameters(model: torch.nn.Module) -> int:
    """All parameters, tied ones once."""
    return sum(true_shape(parameter).numel() for parameter in model.parameters())
