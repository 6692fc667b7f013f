"""Folder -> model, ready for the engine: partitioned under ZeRO-3, with embedding rows for added tokens."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Collection, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils.z3_leaf_module import set_z3_leaf_module
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.utils import logging as transformers_logging

from stoker_proto.actions.vocabulary import ActionVocabulary
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError
from stoker_proto.host.hub_cache import find_model_folder
from trainer.engine.optimizer import beginnings, matches
from trainer.engine.zero import partitioned_loading
from trainer.models.families import Family, check_forward
from trainer.models.lora import add_adapters
from trainer.models.recomputing import recompute_layers

log = logging.getLogger(__name__)
transformers_logging.disable_progress_bar()  # one per rank, for seconds of loading


def load_model(config: Config, family: Family, settings: dict[str, Any], vocab_size_needed: int) -> PreTrainedModel:
    """The base model in `model.precision`, on the CPU or partitioned. Raises ConfigError."""
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    folder = str(find_model_folder(config.model.base_model_path))
    with partitioned_loading(settings):
        try:
            model, report = family.auto_class.from_pretrained(
                folder, dtype=dtype, trust_remote_code=config.model.trust_remote_code, local_files_only=True,
                output_loading_info=True, **attention_options(config),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            raise _unloadable(folder, str(error)) from error
        except RuntimeError as error:
            if not any(words in str(error) for words in _OTHER_SHAPES):
                raise
            raise _unloadable(folder, f"its weights have other shapes than its config.json says ({error})") from error
        _refuse_random(model, report, folder)
        forget_unused_renamings(model)
        old_size = true_shape(model.get_input_embeddings().weight)[0]
        grow_embeddings(model, vocab_size_needed)
    if hasattr(model, "freeze_unused"):  # afterwards, as loading makes parameters anew
        model.freeze_unused()
    check_forward(model, family, packing=config.data.packing)
    choose_trained(model, config, grown=old_size < true_shape(model.get_input_embeddings().weight)[0])
    if config.model.gradient_checkpointing:
        recompute_layers(model)
    return model


_OTHER_SHAPES = ("ignore_mismatched_sizes", "loading state_dict")
"""Words of transformers' and PyTorch's errors."""


def _unloadable(folder: str, reason: str) -> ConfigError:
    lines = [line.strip() for line in reason.strip().splitlines()]
    return ConfigError(f"model.base_model_path is {folder!r}: the model cannot be loaded: {' '.join(lines[:2])}")


def _refuse_random(model: PreTrainedModel, report: Mapping[str, Collection[Any]], folder: str) -> None:
    """Raises ConfigError where the folder lacks weights of the model: transformers fills in random ones, and says so in a table.

    report: `output_loading_info` of `from_pretrained`.
    """
    own = {name for name, _ in model.named_parameters()}
    missing = sorted(own.intersection(report["missing_keys"]))
    if not missing:
        return
    unknown = sorted(map(str, report["unexpected_keys"]))
    others = f"; it has {len(unknown)} that the model does not know, such as {unknown[0]}" if unknown else ""
    raise ConfigError(
        f"model.base_model_path is {folder!r}: it lacks {len(missing)} of the model's {len(own)} weights, such as {missing[0]}, "
        f"and they would begin at random{others}: name the folder of a whole model"
    )


def forget_unused_renamings(model: PreTrainedModel) -> None:
    """Keep of transformers' renamings only those that loading used, as its ordinary loading does.

    Saving reverts what is kept. Under ZeRO-3 transformers 5.23 keeps all that it knows for the model's type, and an export would
    have names that no published checkpoint has: `language_model.model.model.norm.weight`.
    """
    known = getattr(model, "_weight_conversions", None)
    if known:
        model._weight_conversions = [one for one in known if isinstance(one, WeightConverter) or one.was_used()]


def choose_trained(model: PreTrainedModel, config: Config, *, grown: bool) -> None:
    """Decide which parameters are trained: adapters, or all but the frozen ones. Raises ConfigError.

    grown: whether the embeddings got new rows, which adapters would leave untrained.
    """
    lora, patterns = config.model.lora, config.model.freeze
    if lora is not None:
        if patterns:
            raise ConfigError(
                f"model.freeze is {list(patterns)} beside model.lora, which freezes all weights of the base model: take one"
            )
        if grown:
            raise ConfigError(
                "model.lora leaves the embeddings as they are, but the data's tokens need new rows in them, which would never be "
                "learned: use data.action.vocabulary=reuse_last, or train without model.lora"
            )
        add_adapters(model, lora, config.trainer.seed)
        head = model.get_output_embeddings()
        if hasattr(head, "lora_A") and config.trainer.zero_stage == 3:
            set_z3_leaf_module(head, True)  # its weights are then gathered together, as its loss in chunks needs
            head.register_forward_pre_hook(_with_gradient)
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            raise ConfigError(
                f"model.freeze names {pattern!r}, which matches no parameter; names begin with "
                f"{', '.join(beginnings(names)[:12])}, and * stands for any part"
            )
    for name, parameter in model.named_parameters():
        if matches(name, patterns):
            parameter.requires_grad_(False)
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is model.get_input_embeddings().weight
    if patterns and is_tied and not head.weight.requires_grad:
        log.warning("model.freeze: the head is frozen, too, as its weights are the input embeddings")


def _with_gradient(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """The head's hidden states with a gradient, also above layers that are all frozen.

    ZeRO-3 adds up the gradients of a module whose weights are gathered together when the gradient of its input is there. Without
    one it does so before the module's own backward, and partitions weights that are still needed.
    """
    if not torch.is_grad_enabled() or inputs[0].requires_grad:
        return None
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def check_new_tokens(model: PreTrainedModel, vocabulary: ActionVocabulary | None) -> None:
    """Raises ConfigError for new action tokens (`data.action.vocabulary: added`) that would never be learned.

    They may need no new rows: many published embeddings have some hundred more than the tokenizer has tokens.
    """
    if vocabulary is None or vocabulary.mode != "added":
        return
    layers = {"input embeddings": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    frozen = [name for name, layer in layers.items() if layer is not None and not layer.weight.requires_grad]
    if frozen:
        raise ConfigError(
            f"data.action.vocabulary is added, and model.lora or model.freeze leaves the {' and the '.join(frozen)} as they are, "
            "so the new tokens would never be learned: use data.action.vocabulary=reuse_last, or train the embeddings"
        )


def attention_options(config: Config) -> dict[str, str]:
    """Arguments of `from_pretrained` for `model.attention`. Raises ConfigError."""
    if config.model.attention == "auto":
        return {}
    if config.model.attention != "flash":
        return {"attn_implementation": config.model.attention}
    if config.model.precision != "bf16":
        raise ConfigError(
            "model.attention is flash, which computes in bf16 only: set model.precision to bf16, or take sdpa"
        )
    if not torch.cuda.is_available():
        raise ConfigError("model.attention is flash, which needs a GPU: take auto or sdpa")
    if importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention is flash, which needs the package flash-attn, which is not installed: pip install flash-attn "
            "--no-build-isolation, or take auto or sdpa"
        )
    return {"attn_implementation": "flash_attention_2"}


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


def count_parameters(model: torch.nn.Module, *, trained: bool = False) -> int:
    """All parameters, tied ones once; or those that are trained."""
    return sum(
        true_shape(parameter).numel() for parameter in model.parameters() if parameter.requires_grad or not trained
    )
