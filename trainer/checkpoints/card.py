"""The model card of an export, `README.md`: what was trained on what, how well it does, and the lines that load it.

    ---
    base_model: openvla/openvla-7b
    library_name: transformers
    tags: [stoker, robotics]
    ---
    # openvla-7b, fine-tuned with Stoker
    ...

The hub shows it as it is. The Python block is complete: `tests/trainer/checkpoints/test_export.py` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from stoker_proto.config import Config
from stoker_proto.host.hub_cache import hub_id_of
from stoker_proto.images.padding import unpadded_by
from stoker_proto.model_folder import ModelFolder
from stoker_proto.processor import Processor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """What is known about the training of the weights that are exported."""

    steps: int
    """Optimizer steps."""
    samples: int
    """Samples trained, over all epochs."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Figures by name, `train/loss`, `val/perplexity`; empty where nothing was measured."""
    choice: str = ""
    """A sentence that says why these weights and not those of another step; "" where there was no choice."""


def model_card(config: Config, processor: Processor, facts: TrainingFacts, *, kind: str, sees_images: bool) -> str:
    """The text of README.md. kind: `model_type` of the exported config.json."""
    name = Path(config.model.base_model_path).name
    parts = [
        _front_matter(config, processor, sees_images=sees_images),
        f"# {name}, fine-tuned with Stoker\n",
        f"## Data\n\n{_data(config)}",
        f"## Training\n\n{_training(config, facts)}",
    ]
    if processor.codec is not None:
        parts.append(f"## Actions\n\n{_actions(processor)}")
    parts.append(f"## Scores\n\n{_scores(facts)}")
    parts.append(f"## Loading\n\n{_loading(config, processor, kind=kind, sees_images=sees_images)}")
    parts.append("## Upload\n\n```sh\nhf upload YOUR_NAME/YOUR_MODEL .   # in this folder\n```\n")
    return "\n".join(parts)


def _front_matter(config: Config, processor: Processor, *, sees_images: bool) -> str:
    lines = ["---"]
    if (base := hub_id_of(config.model.base_model_path)) is not None:
        lines.append(f"base_model: {base}")
    lines.append("library_name: transformers")
    lines.append(f"pipeline_tag: {_task(processor, sees_images=sees_images)}")
    lines.append("tags: [stoker]")
    return "\n".join([*lines, "---", ""])


def _task(processor: Processor, *, sees_images: bool) -> str:
    if processor.codec is not None:
        return "robotics"
    return "image-text-to-text" if sees_images else "text-generation"


def _data(config: Config) -> str:
    lines = ["| source | type | paths | weight |", "|---|---|---|---|"]
    for name, source in zip(config.data.source_names(), config.data.all_sources(), strict=True):
        paths = ", ".join(f"`{path}`" for path in source.paths)
        lines.append(
            f"| {name} | `{source.dataset_type}` | {paths} | {'' if source.weight is None else source.weight} |"
        )
    lines.append(f"\nRows of at most {config.data.max_seq_len} tokens{', packed' if config.data.packing else ''}.\n")
    return "\n".join(lines)


def _training(config: Config, facts: TrainingFacts) -> str:
    trainer = config.trainer
    base, average = hub_id_of(config.model.base_model_path), ""
    if trainer.ema_decay:
        average = (
            f"The weights here are the exponential average of the trained ones, with decay {trainer.ema_decay:g}; the scores are "
            "those of the trained ones. "
        )
    choice = f"{facts.choice} " if facts.choice else ""
    return (
        f"{f'Base model: `{base}`. ' if base else ''}{facts.steps} steps of {trainer.global_batch_size} rows, "
        f"{facts.samples} samples in all. {choice}AdamW, peak learning rate {trainer.lr:g} ({trainer.lr_schedule}), weight decay "
        f"{trainer.weight_decay:g}, {config.model.precision}. {average}`stoker_processor.json` holds all that turns observations "
        "into tokens.\n"
    )


def _actions(processor: Processor) -> str:
    codec, vocabulary = processor.codec, processor.vocabulary
    assert codec is not None  # the caller's condition
    ids = "" if vocabulary is None else f", as the ids {vocabulary.first_id} to {vocabulary.end_id - 1}"
    low, high = (
        ", ".join(f"{value:.4g}" for value in values) for values in (codec.statistics.q01, codec.statistics.q99)
    )
    return (
        f"Codec `{codec.name}`: chunks of {codec.chunk} actions of {codec.statistics.dim} numbers{ids}. Fitted to "
        f"{codec.statistics.count} actions.\n\n"
        f"- 1st percentiles: {low}\n- 99th percentiles: {high}\n"
    )


def _scores(facts: TrainingFacts) -> str:
    if not facts.scores:
        return "Nothing was measured. Success of a policy is measured in closed loop, not by these figures.\n"
    rows = [f"| {name} | {value:.6g} |" for name, value in sorted(facts.scores.items())]
    return "\n".join(["| figure | value |", "|---|---|", *rows, ""])


def _loading(config: Config, processor: Processor, *, kind: str, sees_images: bool) -> str:
    auto, other = ("AutoModelForCausalLM", "AutoTokenizer")
    if sees_images:
        auto, other = "AutoModelForImageTextToText", "AutoProcessor" if kind != "openvla" else "AutoTokenizer"
    lines = []
    if kind == "openvla":
        lines.append("import trainer.models  # of Stoker: the Auto classes know OpenVLA then\n")
    lines.append(f"from transformers import {auto}, {other}\n")
    lines.append('folder = "."  # this folder, or the id under which it was uploaded')
    lines.append(f"model = {auto}.from_pretrained(folder)")
    lines.append(f"{'processor' if other == 'AutoProcessor' else 'tokenizer'} = {other}.from_pretrained(folder)")
    text = "\n".join(["```python", *lines, "```", ""])
    unpadded = unpadded_by(processor.image, ModelFolder(config.model.base_model_path))
    if unpadded is not None:
        text += f"\n{unpadded}.\n"
    if kind == "openvla":
        key = "+".join(config.data.source_names())
        text += (
            "\nOpenVLA's published code reads it too, where the base model's folder holds that code (transformers 4.40.1): "
            f"`AutoModelForVision2Seq.from_pretrained(folder, trust_remote_code=True)`, "
            f"`predict_action(..., unnorm_key={key!r})`.\n"
        )
    if processor.codec is not None:
        text += (
            "\nAs a policy: `from trainer.policy import Policy`, then `Policy.load(folder).act([frame], instruction)` turns "
            "uint8[H, W, 3] frames into float32[chunk, dimensions] actions.\n"
        )
    return text
