"""The command line of `trainer/main.py`: its flags, its log lines and its errors. Imports nothing heavy."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from stoker_proto.config import Config, check_batch_arithmetic
from stoker_proto.config.reader import add_config_arguments, load_config
from stoker_proto.errors import ConfigError, StokerError


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """The checked config that `--config` and `--set` name. Raises ConfigError."""
    parser = argparse.ArgumentParser(
        prog="deepspeed trainer/main.py",
        description="Train a model on what the loaders send (ZeRO-3), validate, save and export it.",
    )
    add_config_arguments(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)  # the launcher's
    known = parser.parse_args(arguments)
    config = load_config(known.config, known.set)
    check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_model_path(config)
    return config


def check_world(config: Config, world_size: int) -> None:
    """The ranks that the launcher started are those that the config means. Raises ConfigError."""
    slots = len(config.cluster.component_placement.trainer)
    if slots and slots != world_size:
        raise ConfigError(
            f"cluster.component_placement.trainer names {slots} slots, but the launcher started {world_size} ranks: "
            f"start as many (deepspeed --num_gpus {slots} ...), or change the placement"
        )
    check_batch_arithmetic(config.trainer.global_batch_size, config.trainer.micro_batch_size, world_size)


def check_model_path(config: Config) -> None:
    """The base model is a folder that can be loaded from. Raises ConfigError."""
    folder = Path(config.model.base_model_path)
    for path, what in ((folder, "folder"), (folder / "config.json", "file")):
        if not path.exists():
            raise ConfigError(
                f"model.base_model_path is {config.model.base_model_path!r}: there is no {what} {path}; name the folder of "
                "a downloaded model (config.json, weights, tokenizer.json)"
            )


def set_up_logging() -> None:
    """INFO lines from rank 0, warnings from every rank, each with its rank."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    # DeepSpeed still calls collectives by names that PyTorch is renaming: nothing that a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")


def report_error(error: StokerError) -> None:
    """One line on stderr, with the rank where there are several: then also a line feed in front, as the first rank's progress
    bar may stand there."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    text = f"\nerror (rank {rank}): {error}" if world_size > 1 else f"error: {error}"
    print(text, file=sys.stderr, flush=True)
