"""What an OpenVLA's export holds beside weights and tokenizer, so that the published code can load it.

    config.json               the base model's, key by key, with our statistics in `norm_stats` and the format of the weights
    dataset_statistics.json   our statistics alone: published evaluation scripts take their `unnorm_key` from it
    *_prismatic.py            the remote code that `auto_map` names, where the base model's folder has it: copied, never run

    norm_stats {"mani_openpi": {"action": {"q01": [...], "q99": [...], "mask": [..., false], "mean": ..., ...},
                                "num_transitions": 3021}}

The published code reads one action of `bins` with `vocabulary: reuse_last`, and only the first timestep of a chunk.
Source: openvla `prismatic/vla/datasets/rlds/utils/data_utils.py` (save_dataset_statistics), `vla-scripts/finetune.py`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.processor import Processor

log = logging.getLogger(__name__)


def write_published_files(
    base: Path, target: Path, *, processor: Processor, sources: Sequence[str], dtype: str, vocab_size: int
) -> None:
    """Replace the config.json that transformers wrote, and add the other files.

    base: the base model's folder; target: the export; sources: names of the datasets; dtype: of the weights, e.g. "bfloat16";
    vocab_size: rows of the embedding.
    """
    tree = json.loads((base / "config.json").read_text(encoding="utf-8"))
    _set_dtype(tree, dtype)
    text = tree.setdefault("text_config", {})
    if text.get("dtype") or text.get("torch_dtype"):
        _set_dtype(text, dtype)
    text["vocab_size"] = vocab_size
    if processor.codec is not None:
        key = "+".join(sources)
        statistics = {key: published_statistics(processor.codec.statistics)}
        tree["norm_stats"] = {**(tree.get("norm_stats") or {}), **statistics}
        _write(target / "dataset_statistics.json", statistics)
        if processor.codec.name == "bins":
            tree["n_action_bins"] = processor.codec.num_codes
        if processor.codec.name != "bins" or processor.vocabulary is None or processor.vocabulary.mode != "reuse_last":
            log.warning(
                "%s: OpenVLA's published code reads actions of data.action.codec=bins with data.action.vocabulary=reuse_last "
                "only; this model has others, which Stoker's Policy reads",
                target,
            )
    _write(target / "config.json", tree)
    for module in sorted({str(name).partition(".")[0] for name in (tree.get("auto_map") or {}).values()}):
        if (base / f"{module}.py").is_file():
            shutil.copyfile(base / f"{module}.py", target / f"{module}.py")


def published_statistics(statistics: ActionStatistics) -> dict[str, Any]:
    """An entry of `norm_stats`. A dimension that never moved gets mask true and q01 = q99: unnormalised, that is its value."""
    constant = statistics.min == statistics.max
    arrays = {
        "mean": statistics.mean,
        "std": statistics.std,
        "max": statistics.max,
        "min": statistics.min,
        "q01": np.where(constant, statistics.min, statistics.q01),
        "q99": np.where(constant, statistics.max, statistics.q99),
        "mask": statistics.mask | constant,
    }
    action = {name: array.tolist() for name, array in arrays.items()}
    return {"action": action, "num_transitions": statistics.count}


def _set_dtype(tree: dict[str, Any], dtype: str) -> None:
    """Under the name that the file has; transformers 4 wrote `torch_dtype`, and 5 reads both."""
    tree["dtype" if "dtype" in tree else "torch_dtype"] = dtype


def _write(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
