"""The command line of `trainer/main.py`: flags, log lines and error lines. Imports nothing heavy."""

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
from stoker_proto.host.hub_cache import explain_missing, find_model_folder

_EXAMPLES = """\
examples:
  stoker-launch --config my.yaml                            loaders and ranks of this machine, started together
  loader-serve --config my.yaml --bind tcp://127.0.0.1:5555                     a loader in one terminal, and in another:
  stoker-train --config my.yaml --set 'cluster.loader_addresses=[tcp://127.0.0.1:5555]'              one rank
  deepspeed --num_gpus 8 --module trainer.main --config my.yaml                                      eight ranks
  stoker-train --config my.yaml --plan --samples 100000     memory, disk, steps, before anything starts
  stoker-train --config my.yaml --check                     the gates before a training; trains nothing

A run resumes from the newest checkpoint of its trainer.output_dir; the model for transformers is in its folder `export`."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        prog="stoker-train" if Path(sys.argv[0]).name == "stoker-train" else "deepspeed trainer/main.py",
        description="Train a model on the samples that the loaders send (ZeRO), validate, save and export it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS
    )  # set by the launcher
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="the same as --set trainer.logger.metrics=HOST:PORT: the first rank serves metrics",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="train nothing: replay demonstrations in the simulator, as recorded and after a round trip through the action "
        "tokens; exit code 1 if they fail (also without loaders: python -m trainer.sim.replay)",
    )
    parser.add_argument(
        "--start-within-s", type=float, metavar="S", help=argparse.SUPPRESS
    )  # deploy/launch.py names the loaders on stdin: see `stoker_proto.host.start`
    add_plan_arguments(parser)
    return parser.parse_args(arguments)


def read_config(options: argparse.Namespace) -> Config:
    """The checked config from `--config`, `--set` and `--metrics`. Raises ConfigError."""
    metrics = [] if options.metrics is None else [f"trainer.logger.metrics={options.metrics}"]
    config = load_config(options.config, [*options.set, *metrics])
    if not options.plan:
        check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_model_path(config)
    return config


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--plan` and its options."""
    group = parser.add_argument_group("plan", "estimates what the run needs; reads no weights, starts no rank")
    add = group.add_argument
    add(
        "--plan",
        action="store_true",
        help="print memory of a rank, size of a checkpoint, steps, tokens, loaders; then exit",
    )
    add("--json", action="store_true", help="the plan as one line of JSON")
    add(
        "--samples",
        type=int,
        metavar="N",
        help="training samples of an epoch; default: the loaders in cluster.loader_addresses report them",
    )
    add("--labels", type=int, metavar="N", help="labels of a row, for the memory of logits; default: data.max_seq_len")
    add("--samples-per-second", type=float, metavar="S", help="rate at which all ranks together would train")
    add("--loader-samples-per-second", type=float, metavar="S", help="rate of one loader, as loader-bench measures it")


def check_world(config: Config, world_size: int) -> None:
    """Check the number of ranks that the launcher started. Raises ConfigError."""
    slots = len(config.cluster.component_placement.trainer)
    if slots and slots != world_size:
        raise ConfigError(
            f"cluster.component_placement.trainer names {slots} slots, but the launcher started {world_size} ranks: "
            f"start as many (deepspeed --num_gpus {slots} ...), or change the placement"
        )
    check_batch_arithmetic(config.trainer.global_batch_size, config.trainer.micro_batch_size, world_size)


def check_model_path(config: Config) -> None:
    """Check that the base model is a folder with a config.json. Raises ConfigError."""
    name, folder = config.model.base_model_path, find_model_folder(config.model.base_model_path)
    for path, what in ((folder, "folder"), (folder / "config.json", "file")):
        if not path.exists():
            raise ConfigError(f"model.base_model_path is {name!r}: there is no {what} {path}; {explain_missing(name)}")


def set_up_logging() -> None:
    """INFO lines from rank 0, warnings from every rank, each with its rank."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s rank {rank} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
    # DeepSpeed still calls collectives by names that PyTorch is renaming; a user cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")


def report_error(error: StokerError) -> None:
    """Print one line on stderr. With several ranks it names the rank and starts with a line feed, as the first rank's progress
    bar may stand in that line."""
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get("RANK", "0")
    text = f"\nerror (rank {rank}): {error}" if world_size > 1 else f"error: {error}"
    print(text, file=sys.stderr, flush=True)
