"""Exports a checkpoint, such as the best one, as a model that transformers loads. Runs on one host, without ranks.

    stoker-export --checkpoint outputs/checkpoints/step-00000500 --out outputs/best

DeepSpeed's files hold the trained weights in float32, of all ranks. For a run with `trainer.ema_decay` the averages of the
weights are exported, as at the end of the run. Everything else is in the checkpoint: the config of its run and the processor. The
base model's folder must be where the config says.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.config.reader import config_from_tree
from stoker_proto.errors import ConfigError, StokerError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="stoker-export", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR", help="a folder checkpoints/step-...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: `export` inside of the checkpoint")
    parser.add_argument("--base-model", metavar="DIR", help="default: model.base_model_path of the run")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before DeepSpeed looks for accelerators
    try:
        target = options.out or options.checkpoint / "export"
        export_folder(options.checkpoint, target, options.base_model)
    except StokerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


def export_folder(folder: Path, target: Path, base_model: str | None = None) -> None:
    """Write the export `target` of the checkpoint in `folder`. Raises ConfigError, DataError, HostError.

    An earlier export there is replaced.
    """
    from trainer.checkpoints.from_checkpoint import export_checkpoint  # imports torch and DeepSpeed
    from trainer.checkpoints.state import read_checkpoint

    check_target(target)
    checkpoint = read_checkpoint(folder)
    export_checkpoint(checkpoint, config_of(checkpoint.state, base_model), target)


def check_target(target: Path) -> None:
    """Raises ConfigError for a folder that is no export: it would be replaced with all that it holds."""
    from stoker_proto.processor import FILE

    try:
        is_free = not target.exists() or not any(target.iterdir()) or (target / FILE).is_file()
    except OSError:  # a file
        is_free = False
    if not is_free or target.resolve() == Path.cwd():
        raise ConfigError(
            f"--out is {str(target)!r}, which is there and no export: name a folder that is not there yet"
        )


def config_of(state: dict[str, Any], base_model: str | None) -> Config:
    """The config of the checkpoint's run. Raises ConfigError."""
    config = config_from_tree(state["config"])
    if base_model is not None:
        config = replace(config, model=replace(config.model, base_model_path=base_model))
    return config


if __name__ == "__main__":
    sys.exit(main())
