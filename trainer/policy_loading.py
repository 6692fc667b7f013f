"""Folder -> model and processor of a policy: an export, or a checkpoint of a run.

    outputs/export                       what the trainer exported: weights in the model's number format
    outputs/checkpoints/step-00000500    DeepSpeed's float32 weights of all ranks, put together and converted as an export's; with
                                         `trainer.ema_decay` their averages, with `model.lora` merged into the base model

A checkpoint has no model files of its own, so it needs the base model's folder, which its stoker.json names. Reading it needs the
memory of the whole model in float32, and DeepSpeed. Its weights are pickled, as `trainer/main.py` reads them on a resume: load
checkpoints of your own runs only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from stoker_proto.config import LoraConfig
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.host.hub_cache import find_model_folder
from stoker_proto.processor import FILE, Processor
from trainer.checkpoints.state import STATE_FILE, read_checkpoint
from trainer.checkpoints.weights import read_weights
from trainer.models.families import Family, family_of, read_model_config
from trainer.models.lora import merge


def load_parts(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Processor, Family]:
    """The model on the CPU, its processor and its family. dtype: None: as the run exports it.

    Raises ConfigError for a folder that is neither an export nor a checkpoint, DataError for damaged files.
    """
    if (folder / FILE).is_file():
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ConfigError(
                f"{folder}: it holds adapters alone (model.lora.export: adapter), and a policy needs a whole model: take the "
                "run's checkpoint, whose adapters are merged as it is read"
            )
        processor = Processor.load(folder)
        family = family_of(read_model_config(str(folder)))
        return _load_export(family, folder, dtype), processor, family
    if (folder / STATE_FILE).is_file():
        return _load_checkpoint(folder, dtype)
    raise ConfigError(
        f"{folder}: there is no {FILE}, as an export has it, and no {STATE_FILE}, as a checkpoint has it; name the folder that "
        "the trainer exported, such as outputs/export, or one of its checkpoints, such as outputs/checkpoints/step-00000500"
    )


def _load_export(family: Family, folder: Path, dtype: torch.dtype | None) -> PreTrainedModel:
    """Raises DataError for weights that are damaged or incomplete: transformers would fill in random ones."""
    try:
        model, report = family.auto_class.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(_unreadable(_first_line(error)), file=str(folder)) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise DataError(_unreadable(f"{len(missing)} are missing, such as {missing[0]}"), file=str(folder))
    loaded: PreTrainedModel = model
    return loaded


def _unreadable(reason: str) -> str:
    return f"its weights cannot be loaded: {reason}; export it again"


def _load_checkpoint(folder: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, Processor, Family]:
    from trainer.models.loading import grow_embeddings  # imports DeepSpeed, which an export does without

    config = read_checkpoint(folder).state.get("config", {})
    settings, lora = config.get("model", {}), config.get("model", {}).get("lora")
    name = str(settings.get("base_model_path"))
    base = str(find_model_folder(name))
    if not (Path(base) / "config.json").is_file():
        raise ConfigError(
            f"{folder}: its base model is {name!r}, and there is no config.json in it; put the base model there, or take the "
            "run's export, which is complete"
        )
    processor = Processor.load(folder / "processor")
    trusted = bool(settings.get("trust_remote_code", False))
    family = family_of(read_model_config(base, trusted))
    averages = bool(config.get("trainer", {}).get("ema_decay"))
    weights = read_weights(folder, averages=averages, adapters_only=lora is not None)
    exported = torch.bfloat16 if settings.get("precision") == "bf16" else torch.float32
    model: PreTrainedModel = family.auto_class.from_pretrained(
        base, dtype=torch.float32, trust_remote_code=trusted, local_files_only=True
    )
    grow_embeddings(model, processor.vocab_size_needed)
    if lora is not None:
        _untie_trained_head(model, weights)
        weights = _merged(model, weights, LoraConfig(rank=lora["rank"], alpha=lora["alpha"]), exported, base, folder)
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # another shape
        raise DataError(_not_of(base, _first_line(error)), file=str(folder)) from error
    # A tied parameter has two names, and DeepSpeed may write one of them; buffers are the base model's own.
    own = {name for name, _ in model.named_parameters()} if lora is None else set()  # adapters change few
    lacking = sorted(own & set(missing))
    if lacking or unknown:
        raise DataError(
            _not_of(
                base,
                f"it has {len(unknown)} weights of other names ({unknown[:1]}) and lacks {len(lacking)} ({lacking[:1]})",
            ),
            file=str(folder),
        )
    return model.to(dtype or exported), processor, family


def _not_of(base: str, reason: str) -> str:
    return f"its weights do not fit the base model {base} ({reason}); give the base model that the run was started from"


def _untie_trained_head(model: PreTrainedModel, adapters: dict[str, Any]) -> None:
    """Give the head weights of its own where adapters were trained on it: those of the input embeddings stay as they are."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    if any(adapter.startswith(f"{name}.lora_") for adapter in adapters):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())


def _merged(
    model: PreTrainedModel, adapters: dict[str, Any], config: LoraConfig, dtype: torch.dtype, base: str, folder: Path
) -> dict[str, torch.Tensor]:
    """The base model's weights that have adapters, merged in the export's number format. Raises DataError."""
    own = model.state_dict()
    state = {name: tensor.to(dtype) for name, tensor in adapters.items()}
    for layer in {name.partition(".lora_")[0] for name in adapters}:
        if f"{layer}.weight" not in own:
            raise DataError(_not_of(base, f"it has an adapter for {layer}"), file=str(folder))
        state[f"{layer}.base_layer.weight"] = own[f"{layer}.weight"].to(dtype)
    return merge(state, config)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
