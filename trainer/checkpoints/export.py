"""A model that transformers loads: weights, config, tokenizer and processor of the base model, and Stoker's one object.

{output_dir}/export/
    config.json, model.safetensors (or shards with an index); with `model.lora.export: adapter` adapter_model.safetensors and
                            adapter_config.json instead of both
    generation_config.json  as the base model has it, with the tokens that end learned turns among its `eos_token_id`
    tokenizer.json ..., processor_config.json ...                        as the base model has them; with
                                                                         `data.action.vocabulary: added` also its new tokens
    chat_template.jinja     the template that was trained: the model's own, or Stoker's
    stoker_processor.json   observations -> tokens -> actions: what `trainer.policy.Policy` reads
    README.md               the model card: data, codec, scores, the lines that load it, the command that uploads it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stoker_proto.config import Config
from stoker_proto.host.files import whole_folder
from stoker_proto.host.hub_cache import find_model_folder, hub_id_of
from stoker_proto.images.padding import padding_processor
from stoker_proto.model_folder import ModelFolder
from stoker_proto.processor import Processor
from trainer.checkpoints.card import TrainingFacts, model_card
from trainer.checkpoints.write_errors import writing
from trainer.engine.optimizer import EMA
from trainer.engine.ranks import Ranks, wait_for_all_ranks
from trainer.engine.universal import inner_optimizer
from trainer.engine.zero import Engine, full_optimizer_state, link_optimizer_states
from trainer.models.families import family_of
from trainer.models.loading import true_shape
from trainer.models.lora import merge, write_adapter
from trainer.models.openvla.saving import write_published_files

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "processor_config.json",
    "preprocessor_config.json",
    "generation_config.json",
)
"""Files of the base model from which transformers makes a tokenizer or a processor."""


def export(engine: Engine, config: Config, processor: Processor, ranks: Ranks, facts: TrainingFacts) -> Path:
    """Write the export folder; all ranks call it, the first one writes. A new export replaces an old one only when whole."""
    target = Path(config.trainer.output_dir) / "export"
    state = gather_weights(engine)
    if config.trainer.ema_decay:
        state |= gather_average(engine, ranks)
    if ranks.is_first:
        write_export(target, engine.module, state, config, processor, facts)
    wait_for_all_ranks()
    return target


def write_export(
    target: Path,
    model: PreTrainedModel,
    state: Mapping[str, Any],
    config: Config,
    processor: Processor,
    facts: TrainingFacts,
) -> None:
    """Write the export folder `target` from the model's weights `state`, by name."""
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    weights = in_format(state, dtype)
    kind, lora = model.config.model_type, config.model.lora
    base = find_model_folder(config.model.base_model_path)
    with writing(target), whole_folder(target, unfinished=target.with_name(target.name + ".partial")) as folder:
        copy_base_files(base, folder)
        write_padding(folder, processor)
        is_adapter = lora is not None and lora.export == "adapter"
        if lora is not None and is_adapter:  # beside a config.json the Auto classes would look for whole weights
            write_adapter(folder, weights, lora, base_of_adapter(config.model.base_model_path))
        else:
            model.save_pretrained(folder, state_dict=weights if lora is None else merge(weights, lora))
        if kind == "openvla" and not is_adapter:
            write_published_files(
                base, folder, processor=processor, sources=config.data.source_names(),
                dtype=str(dtype).removeprefix("torch."), vocab_size=model.config.text_config.vocab_size,
            )  # fmt: skip
        _share_weights(folder)
        write_chat_template(folder, processor.chat_template())
        processor.save(folder)  # with a tokenizer.json that has the new tokens of `data.action.vocabulary: added`
        add_stop_ids(folder, processor.turn_ends.ids, known_in=base if is_adapter else folder)
        card = model_card(config, processor, facts, kind=kind, sees_images=family_of(model.config).sees_images)
        (folder / "README.md").write_text(card, encoding="utf-8")


def in_format(state: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The weights with numbers of `dtype`. Names of one tensor stay names of one tensor: tied weights are written once."""
    converted: dict[Any, torch.Tensor] = {}
    found: dict[str, Any] = {}
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if key not in converted:
                converted[key] = tensor.to(dtype)
            tensor = converted[key]
        found[name] = tensor
    return found


def base_of_adapter(name: str) -> str:
    """Where loaders of an adapter find its base model: the hub's id, or a local folder's whole path."""
    return hub_id_of(name) or str(Path(name).resolve())


def _share_weights(folder: Path) -> None:
    """Give the weights the mode of the other files: safetensors writes 0600, and then other users cannot load the export."""
    mode = next(folder.glob("*config.json")).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def gather_weights(engine: Engine) -> dict[str, Any]:
    """The whole model's weights, on the first rank (empty on the others under ZeRO-3)."""
    if engine.zero_optimization_stage() == 3:
        # The public engine.save_16bit_model writes a pickle and needs a flag in the settings; it calls this method.
        # Despite its name it returns the parameters in their own format: float32 in a float32 run.
        return engine._zero3_consolidated_16bit_state_dict() or {}
    state: dict[str, Any] = engine.module.state_dict()
    return state


def gather_average(engine: Engine, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The averages of the trained weights (`trainer.ema_decay`) in float32, on the first rank; all ranks call it.

    Tied weights have all of their names, each with the same tensor: the export must hold the average under whichever it keeps.
    """
    state: dict[str, torch.Tensor] = {}
    if not any(EMA in values for values in inner_optimizer(engine).state.values()):
        return state  # no step was applied yet
    link_optimizer_states(engine)
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            names.setdefault(parameter, []).append(name)
    for parameter, tied in names.items():
        whole = full_optimizer_state(parameter, EMA)
        if ranks.is_first:
            state |= dict.fromkeys(tied, whole.reshape(true_shape(parameter)).cpu())
    return state


def write_chat_template(folder: Path, template: str | None) -> None:
    """Write the template that was trained, and take any other out of the copied files. None: the model has none."""
    for name in ("tokenizer_config.json", "processor_config.json"):
        file = folder / name
        tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if tree.pop("chat_template", None) is not None:
            file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def copy_base_files(source: Path, target: Path) -> None:
    """Copy the files of the base model's tokenizer and processor."""
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def write_padding(folder: Path, processor: Processor) -> None:
    """Make transformers' image processor pad to a square where frames were trained so and it can."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        tree = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        nested = name == "processor_config.json"
        found = tree.get("image_processor") if nested else tree
        if not isinstance(found, dict) or not found:
            continue
        written = padding_processor(processor.image, found)
        if written != found:
            tree = {**tree, "image_processor": written} if nested else written
            file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def add_stop_ids(folder: Path, ids: Sequence[int], *, known_in: Path | None = None) -> None:
    """Add the ids to those at which the exported model stops; a base model may stop elsewhere than its chat template ends turns.

    known_in: folder of the model whose stops are kept; default: `folder`. A model that cannot generate has no
    generation_config.json, and gets none.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    known = ModelFolder(known_in or folder).stop_ids()
    if set(ids) <= set(known):
        return
    tree = json.loads(file.read_text(encoding="utf-8"))
    tree["eos_token_id"] = [*known, *(id for id in ids if id not in known)]
    file.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
