"""`trainer.zero_stage: auto` -> a stage: 1 where a rank's memory allows it, otherwise 3.

bytes per parameter    weights  gradients  optimizer states, divided by the number of ranks
bf16                   2        4          12 (float32 weights, two moments)
fp32                   4        4          8  (two moments)

With `model.lora` the base model's parameters have weights only, and the adapters all three.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError
from stoker_proto.host.hub_cache import find_model_folder
from trainer.engine.host_memory import available_bytes
from trainer.engine.ranks import Ranks, max_over_ranks
from trainer.engine.weight_files import shapes_in

log = logging.getLogger(__name__)

_SHARE = 0.5
"""Of the free memory that may be taken; the rest is for activations."""


def with_zero_stage(config: Config, ranks: Ranks, of_checkpoint: int | None) -> Config:
    """The config with a number in place of `auto`. Every rank calls it, and all get the same: 3 if one of them needs it.

    of_checkpoint: the stage of the checkpoint that is resumed, which is kept. Raises ConfigError.
    """
    if config.trainer.zero_stage != "auto":
        return config
    folder, precision, lora = find_model_folder(config.model.base_model_path), config.model.precision, config.model.lora
    number = count_weights(folder)
    needed = bytes_needed(number, precision, ranks.world_size)
    if lora is not None:
        adapters = bytes_needed(most_adapters(folder, lora.rank), precision, ranks.world_size)
        needed = adapters + number * (2 if precision == "bf16" else 4)
    free = _free_bytes(ranks.device)
    [does_not_fit] = max_over_ranks([float(needed > _SHARE * free)], ranks)
    stage: Literal[1, 2, 3] = 3 if does_not_fit else 1
    if of_checkpoint in (1, 2, 3):
        stage = of_checkpoint  # type: ignore[assignment]  # one of the three
    log.info(
        "trainer.zero_stage auto: %d (stage 1 needs %.1f GB for %d parameters, %.1f GB are free)",
        stage, needed / 1e9, number, free / 1e9,
    )  # fmt: skip
    return replace(config, trainer=replace(config.trainer, zero_stage=stage))


def bytes_needed(num_weights: int, precision: str, world_size: int) -> float:
    """What ZeRO-1 takes on each rank, without activations."""
    whole, shared = (6, 12) if precision == "bf16" else (8, 8)
    return num_weights * (whole + shared / world_size)


def count_weights(folder: Path) -> int:
    """Numbers in the safetensors files of a model, from their headers. Raises ConfigError."""
    return sum(map(math.prod, _shapes(folder)))


def most_adapters(folder: Path, rank: int) -> int:
    """Numbers in adapters of this rank if each matrix of a model had one. Raises ConfigError."""
    return sum(rank * sum(shape) for shape in _shapes(folder) if len(shape) == 2)


def _shapes(folder: Path) -> list[list[int]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{folder}: there are no *.safetensors, whose size decides about trainer.zero_stage auto: set 1, 2 or 3"
        )
    return [shape for file in files for shape in shapes_in(file)]


def _free_bytes(device: torch.device) -> float:
    """For one rank."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return available_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
