"""LoRA: adapters beside linear layers, put into the model in place, and the two forms of their export.

    in the model    model.layers.0.self_attn.q_proj.base_layer.weight, .lora_A.default.weight [r, in], .lora_B.default.weight
    merged          model.layers.0.self_attn.q_proj.weight = base + alpha / r * B @ A
    adapter         base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight ...  (peft's names)

The model keeps its class and its forward. Source: Hu et al. 2021, arXiv 2106.09685; peft `tuners/lora`, `utils/save_and_load.py`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from stoker_proto.config import LoraConfig
from stoker_proto.errors import ConfigError

ADAPTER = "default"
_BESIDE_LANGUAGE = ("vision", "visual", "projector", "connector", "mlp1")
"""Parts of the names of modules that stand beside the language model."""
_BASE, _A, _B = ".base_layer.", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def import_peft() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            "model.lora needs the package peft, which is not installed: pip install -c deploy/constraints.txt 'stoker[lora]', or "
            "--set model.lora=null"
        ) from error


def add_adapters(model: torch.nn.Module, config: LoraConfig, seed: int) -> None:
    """Put adapters into the model; nothing else of it is trained then. Raises ConfigError.

    They start as zero (B) times random numbers of `seed` (A), the same on every rank.
    """
    peft = import_peft()
    targets = find_targets(model, config.targets)
    if config.export == "merged":
        _check_mergeable(model, targets)
    torch.manual_seed(seed)
    peft.inject_adapter_in_model(peft_config(config, targets), model, adapter_name=ADAPTER)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(".lora_" in name)


def peft_config(config: LoraConfig, targets: list[str]) -> Any:
    """peft's own form of the settings."""
    found: Any = import_peft().LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
    )
    return found


def find_targets(model: torch.nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that get adapters, ascending. Raises ConfigError for a target that is none."""
    head = model.get_output_embeddings()  # type: ignore[operator]  # of transformers' models
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    if targets == ("auto",):
        names = {name for name, module in model.named_modules() if module is not head}
        found = {name for name in linear & names if not any(part in name for part in _BESIDE_LANGUAGE)}
        return sorted(found)
    chosen: set[str] = set()
    for target in targets:
        matching = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matching:
            last = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise ConfigError(
                f"model.lora.targets names {target!r}: the model has no linear layer of that name; its linear layers are {last}"
            )
        chosen |= matching
    return sorted(chosen)


def _check_mergeable(model: torch.nn.Module, targets: list[str]) -> None:
    """Raises ConfigError for an adapter on a head whose weights are the input embeddings, too: merged, it would change both."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embeddings.weight:
        return
    name = next((name for name, module in model.named_modules() if module is head), "")
    if name in targets:
        raise ConfigError(
            f"model.lora.targets names {name}, whose weights are the input embeddings, too (tie_word_embeddings): an adapter "
            "there cannot be merged into a model that ties them; leave it out, or set model.lora.export to adapter"
        )


def merge(state: Mapping[str, torch.Tensor], config: LoraConfig) -> dict[str, torch.Tensor]:
    """The weights of the whole model by the base model's names, adapters added in float32. state: of the model with adapters."""
    merged: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        if not name.endswith(".base_layer.weight"):
            merged[name.replace(_BASE, ".")] = tensor
            continue
        layer = name.removesuffix(".base_layer.weight")
        change = state[layer + _B].float() @ state[layer + _A].float() * (config.alpha / config.rank)
        if change.shape != tensor.shape:  # Conv1D of GPT-2 holds its weight transposed
            change = change.T
        merged[f"{layer}.weight"] = (tensor.float() + change).to(tensor.dtype)
    return merged


def write_adapter(folder: Path, state: Mapping[str, torch.Tensor], config: LoraConfig, base: str) -> None:
    """adapter_model.safetensors and adapter_config.json. base: path or hub id of the base model, as loaders of it need it."""
    adapters = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor.contiguous()
        for name, tensor in state.items()
        if ".lora_" in name
    }
    targets = sorted({name.partition(".lora_")[0] for name in state if ".lora_" in name})
    settings = peft_config(config, targets)
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.save_pretrained(folder)
    tree = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tree["target_modules"] = targets  # peft writes a set, in another order each time
    (folder / "adapter_config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
