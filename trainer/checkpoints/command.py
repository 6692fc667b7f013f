"""Exports a checkpoint, such as the best one, as a model that transformers loads. Runs on one host, without ranks.

    stoker-export --checkpoint outputs/checkpoints/step-00000500 --out outputs/best

DeepSpeed's files hold the trained weights in float32, of all ranks. For a run with `trainer.ema_decay` the averages of the
weights are exported, as at the end of the run. Everything else is in the checkpoint: the config of its run and the processor. The
base model's folder must be where the config says.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.config.reader import config_from_tree
from stoker_proto.errors import ConfigError, DataError, StokerError
from stoker_proto.host.hub_cache import find_model_folder

log = logging.getLogger(__name__)


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
        target = export_checkpoint(options.checkpoint, options.out or options.checkpoint / "export", options.base_model)
    except StokerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


def export_checkpoint(folder: Path, target: Path, base_model: str | None = None) -> Path:
    """Write the export `target` of the checkpoint in `folder`. Raises ConfigError, DataError, HostError.

    An earlier export there is replaced.
    """
    from stoker_proto.processor import Processor
    from trainer.checkpoints.card import TrainingFacts
    from trainer.checkpoints.export import write_export
    from trainer.checkpoints.state import read_checkpoint

    check_target(target)
    checkpoint = read_checkpoint(folder)
    config = config_of(checkpoint.state, base_model)
    processor = Processor.load(folder / "processor")
    model = build_model(config, processor.vocab_size_needed)
    weights = read_weights(folder, adapters_only=config.model.lora is not None, averages=bool(config.trainer.ema_decay))
    state = {**model.state_dict(), **weights}
    unknown = sorted(set(weights) - set(model.state_dict()))
    if unknown:
        raise DataError(
            f"it holds weights that the base model lacks ({', '.join(unknown[:3])}): name its own base model with "
            "--base-model",
            file=str(folder),
        )
    cursor = checkpoint.cursor
    facts = TrainingFacts(steps=cursor.step, samples=cursor.position, scores=checkpoint.state.get("scores", {}))
    write_export(target, model, state, config, processor, facts)
    return target


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


def build_model(config: Config, vocab_size_needed: int) -> Any:
    """The base model with whatever training added to it, on the CPU in float32. Raises ConfigError."""
    from trainer.models.families import family_of, read_model_config
    from trainer.models.loading import load_model

    folder = find_model_folder(config.model.base_model_path)
    family = family_of(read_model_config(str(folder), config.model.trust_remote_code))
    whole = replace(config, model=replace(config.model, precision="fp32", gradient_checkpointing=False, freeze=()))
    return load_model(whole, family, {"zero_optimization": {"stage": 0}}, vocab_size_needed)


def read_weights(folder: Path, *, adapters_only: bool, averages: bool = False) -> dict[str, Any]:
    """float32 weights by name, from DeepSpeed's files. averages: those of `trainer.ema_decay` instead. Raises DataError."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from trainer.engine.averages import readable_states

    try:
        with (
            readable_states(averages=averages),
            contextlib.redirect_stdout(sys.stderr),
        ):  # it prints; the command's own output is the folder alone
            found: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
                str(folder), tag="deepspeed", exclude_frozen_parameters=adapters_only
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(f"DeepSpeed cannot read it ({error}): the checkpoint is damaged", file=str(folder)) from error
    return found


if __name__ == "__main__":
    sys.exit(main())
