"""The plan of a run: everything that `--plan` prints, as one tree, and the tree as text."""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from stoker_proto.config import Config, LoraConfig
from stoker_proto.host.hub_cache import find_model_folder
from trainer.engine.optimizer import count_steps
from trainer.models.families import read_model_config
from trainer.plan.activations import activation_bytes
from trainer.plan.memory import STAGES, checkpoint_bytes, logit_bytes, memory_of_rank
from trainer.plan.shape import ModelShape, empty_model, parts_of, shape_of, without_adapters

WORLD_SIZES = (1, 4, 8)
_COLUMNS = ("weights", "gradients", "optimizer", "working", "activations", "logits", "total", "host")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the user or the loaders say of a run."""

    samples: int | None = None
    """Of an epoch."""
    labels: int | None = None
    """Of a row; None: all of its tokens."""
    vocab_size_needed: int = 0
    """Tokens that the data have; larger than the model's vocabulary where new ones were added."""
    samples_per_second: float | None = None
    """Of all ranks."""
    loader_samples_per_second: float | None = None
    """Of one loader."""


def make_plan(config: Config, known: Known) -> dict[str, Any]:
    """The whole plan. Raises ConfigError."""
    world_size = len(config.cluster.component_placement.trainer) or int(os.environ.get("WORLD_SIZE", "1"))
    tables: list[dict[str, Any]] = []
    notes: list[str] = []
    chosen: ModelShape | None = None
    for variant in _variants(config, notes):
        model = empty_model(
            variant, read_model_config(_folder(config), config.model.trust_remote_code), known.vocab_size_needed
        )
        shape = shape_of(model, variant)
        if chosen is None:
            chosen, parts = shape, parts_of(model)
            activations = _activations(model, config)
        tables += _table(shape, variant, world_size, activations, known)
    assert chosen is not None  # the first variant is the config itself
    if activations is None:
        notes.append("activations are not known: the model's forward needs real numbers")
    stages = (1, 3) if config.trainer.zero_stage == "auto" else (config.trainer.zero_stage,)
    return {
        "model": {
            "path": config.model.base_model_path, "precision": config.model.precision,
            "parameters": chosen.num_parameters, "trained": chosen.num_trained, "parts": parts,
        },
        "ranks": world_size, "zero_stages": list(stages), "rows_of_a_forward": config.trainer.micro_batch_size,
        "labels_of_a_row": _labels(config, known), "memory": tables, "memory_free": _free_memory(world_size),
        "checkpoint": _checkpoint(chosen, config, stages[-1]), "run": _run(config, known), "loaders": _loaders(config, known),
        "notes": notes,
    }  # fmt: skip


def _folder(config: Config) -> str:
    return str(find_model_folder(config.model.base_model_path))


def _variants(config: Config, notes: list[str]) -> list[Config]:
    """The config itself, and the other way to train: adapters, or all weights."""
    if config.model.lora is not None:
        return [config, without_adapters(config)]
    if importlib.util.find_spec("peft") is None:
        notes.append("LoRA is not shown: peft is not installed (pip install 'stoker[lora]')")
        return [config]
    return [config, replace(config, model=replace(config.model, lora=LoraConfig(), freeze=()),
                            trainer=replace(config.trainer, parameter_groups=()))]  # fmt: skip


def _activations(model: Any, config: Config) -> int | None:
    return activation_bytes(
        model, config.trainer.micro_batch_size, config.data.max_seq_len,
        checkpointing=config.model.gradient_checkpointing, eager=config.model.attention == "eager",
    )  # fmt: skip


def _labels(config: Config, known: Known) -> int:
    return min(known.labels or config.data.max_seq_len, config.data.max_seq_len)


def _labels_at_a_time(shape: ModelShape, config: Config, known: Known) -> int:
    """Labels of a micro-batch whose logits are there together; a model that cannot do with fewer says so when its run begins."""
    labels, loss = config.trainer.micro_batch_size * _labels(config, known), config.trainer.loss
    is_per_label = loss.type == "cross_entropy" or (loss.type == "ordinal" and config.data.action.codec == "bins")
    return min(labels, loss.chunk_labels) if loss.chunk_labels and shape.has_linear_head and is_per_label else labels


def _table(
    shape: ModelShape, config: Config, world_size: int, activations: int | None, known: Known
) -> list[dict[str, Any]]:
    """A row for each number of ranks and stage."""
    lora = config.model.lora
    logits = logit_bytes(_labels_at_a_time(shape, config, known), shape.vocabulary, config.model.precision)
    return [
        {"trains": "all" if lora is None else f"LoRA rank {lora.rank}", "ranks": ranks, "stage": stage}
        | memory_of_rank(
            shape, config, stage=stage, world_size=ranks, activations=activations, logits=logits
        ).to_json()
        for ranks in sorted({*WORLD_SIZES, world_size})
        for stage in STAGES
    ]  # fmt: skip


def _free_memory(world_size: int) -> dict[str, Any]:
    """Bytes for one rank on this machine."""
    if torch.cuda.is_available():
        return {"of": torch.cuda.get_device_name(0), "bytes": torch.cuda.get_device_properties(0).total_memory}
    return {
        "of": f"this machine's memory for each of {world_size} ranks",
        "bytes": psutil.virtual_memory().available // world_size,
    }


def _checkpoint(shape: ModelShape, config: Config, stage: int) -> dict[str, int]:
    """Bytes of a checkpoint, of the export, of all that `output_dir` holds at most, and what is free there."""
    one = checkpoint_bytes(shape, config, stage=stage)
    lora, width = config.model.lora, 2 if config.model.precision == "bf16" else 4
    is_adapter = lora is not None and lora.export == "adapter"
    export = (shape.num_trained if is_adapter else shape.num_parameters) * width if config.trainer.export else 0
    kept = config.trainer.checkpoint.keep + (config.trainer.checkpoint.best is not None)
    folder = Path(config.trainer.output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    return {
        "bytes": one,
        "kept": kept,
        "export_bytes": export,
        "most_bytes": one * (kept + 1) + export,  # the newest one is written before the oldest one goes
        "free_bytes": shutil.disk_usage(there).free,
    }


def _run(config: Config, known: Known) -> dict[str, int] | None:
    """Steps and tokens; None where the number of samples is not known."""
    if known.samples is None:
        return None
    trainer = config.trainer
    steps = count_steps(trainer, known.samples)
    rows = min(known.samples * trainer.epochs, steps * trainer.global_batch_size)
    return {
        "samples": known.samples,
        "epochs": trainer.epochs,
        "steps": steps,
        "most_tokens": rows * config.data.max_seq_len,
    }


def _loaders(config: Config, known: Known) -> dict[str, Any] | None:
    """How many loaders the rate needs; None where no rate was passed."""
    rate, each = known.samples_per_second, known.loader_samples_per_second
    if rate is None:
        return None
    planned = len(config.cluster.component_placement.dataloader) or len(config.cluster.loader_addresses)
    found: dict[str, Any] = {"samples_per_second": rate, "planned": planned}
    if each is not None:
        found |= {"loader_samples_per_second": each, "needed": math.ceil(rate / each)}
    elif planned:
        found["each_must_deliver"] = rate / planned
    return found


def as_text(plan: dict[str, Any]) -> str:
    """The plan for people."""
    model, checkpoint = plan["model"], plan["checkpoint"]
    unit, name = (1e9, "GB") if max(row["total"] for row in plan["memory"]) > 1e9 else (1e6, "MB")
    short = "" if checkpoint["most_bytes"] <= checkpoint["free_bytes"] else ": TOO LITTLE"
    return "\n".join(
        [
            f"model: {model['path']}: {model['parameters']:,} parameters, {model['trained']:,} of them trained, "
            f"{model['precision']}",
            *(f"  {part:<40} {size:>16,}" for part, size in list(model["parts"].items())[:6]),
            "",
            f"memory of a rank in {name}; {plan['rows_of_a_forward']} rows a forward, {plan['labels_of_a_row']} labels a row; "
            "* is this run",
            "  " + f"{'trains':<14}{'ranks':>6}{'stage':>6}" + "".join(f"{column:>12}" for column in _COLUMNS),
            *(_row(row, plan, unit) for row in plan["memory"]),
            f"  free: {plan['memory_free']['bytes'] / unit:.1f} {name} ({plan['memory_free']['of']}); host: what trainer.offload "
            "moves there",
            "  working and logits are upper bounds, activations those of the language model; stage 0 is for comparison",
            "",
            f"disk: a checkpoint is {_size(checkpoint['bytes'])}, {checkpoint['kept']} are kept, the export is "
            f"{_size(checkpoint['export_bytes'])}: at most {_size(checkpoint['most_bytes'])} of the "
            f"{_size(checkpoint['free_bytes'])} that are free{short}",
            _run_line(plan["run"]),
            _loader_line(plan["loaders"]),
            *(f"note: {note}" for note in plan["notes"]),
        ]
    )


def _row(row: dict[str, Any], plan: dict[str, Any], unit: float) -> str:
    is_this = (row["trains"], row["ranks"]) == (plan["memory"][0]["trains"], plan["ranks"])
    mark = "*" if is_this and row["stage"] in plan["zero_stages"] else " "
    figures = "".join(f"{'?' if row[name] is None else f'{row[name] / unit:.2f}':>12}" for name in _COLUMNS)
    return f"{mark} {row['trains']:<14}{row['ranks']:>6}{row['stage']:>6}{figures}"


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _run_line(run: dict[str, Any] | None) -> str:
    if run is None:
        return (
            "run: steps are not known: pass --samples, or start the loaders and name them in cluster.loader_addresses"
        )
    return (
        f"run: {run['samples']:,} samples an epoch, {run['epochs']} epochs: {run['steps']:,} steps, at most "
        f"{run['most_tokens']:,} tokens"
    )


def _loader_line(loaders: dict[str, Any] | None) -> str:
    if loaders is None:
        return "loaders: pass --samples-per-second (of all ranks) and --loader-samples-per-second (loader-bench) to count them"
    rate = f"loaders: {loaders['samples_per_second']:g} samples/s"
    if "needed" in loaders:
        few = ": TOO FEW" if 0 < loaders["planned"] < loaders["needed"] else ""
        return (
            f"{rate} need {loaders['needed']} loaders of {loaders['loader_samples_per_second']:g} samples/s, one more if one may "
            f"fail; the config has {loaders['planned']}{few}"
        )
    if "each_must_deliver" in loaders:
        return f"{rate}: each of the config's {loaders['planned']} must deliver {loaders['each_must_deliver']:.1f} (loader-bench)"
    return f"{rate}; pass --loader-samples-per-second, as loader-bench measures it"
