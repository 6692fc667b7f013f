"""The export of a checkpoint instead of a running engine: for `stoker-export`, and for the best checkpoint at a run's end.

One process does it, without collectives, so the checkpoint may be that of any number of ranks. Everything that is not in the
checkpoint comes from the base model's folder.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.errors import DataError, HostError, StokerError
from stoker_proto.host.hub_cache import find_model_folder
from stoker_proto.processor import Processor
from trainer.checkpoints.best import Best
from trainer.checkpoints.card import TrainingFacts
from trainer.checkpoints.export import write_export
from trainer.checkpoints.save import Checkpoints
from trainer.checkpoints.state import Checkpoint, read_checkpoint
from trainer.checkpoints.weights import read_weights
from trainer.engine.host_memory import available_bytes
from trainer.engine.ranks import json_of_first_rank
from trainer.models.families import family_of, read_model_config
from trainer.models.loading import load_model

log = logging.getLogger(__name__)

_BYTES = 10
"""Host memory per parameter: the base model and the trained weights in float32, and what is written, in bf16 at least."""


def export_checkpoint(checkpoint: Checkpoint, config: Config, target: Path, choice: str = "") -> None:
    """Write the export folder `target`; an earlier export there is replaced. Raises ConfigError, DataError, HostError.

    config: of the checkpoint's run. choice: a sentence for the model card, see `TrainingFacts`.
    """
    folder, cursor = checkpoint.folder, checkpoint.cursor
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
    facts = TrainingFacts(
        steps=cursor.step, samples=cursor.position, scores=checkpoint.state.get("scores", {}), choice=choice
    )
    write_export(target, model, state, config, processor, facts)


def build_model(config: Config, vocab_size_needed: int) -> Any:
    """The base model with whatever training added to it, on the CPU in float32. Raises ConfigError."""
    folder = str(find_model_folder(config.model.base_model_path))
    family = family_of(read_model_config(folder, config.model.trust_remote_code))
    # Nothing is computed with it, so it takes no attention that needs a GPU or bf16.
    plain = replace(config.model, precision="fp32", gradient_checkpointing=False, freeze=(), attention="auto")
    return load_model(replace(config, model=plain), family, {"zero_optimization": {"stage": 0}}, vocab_size_needed)


def export_best(checkpoints: Checkpoints, best: Best, num_parameters: int, target: Path, choice: str) -> None:
    """Export the checkpoint of the best validation to `target`; every rank calls it, the first one writes.

    num_parameters: of the whole model. Raises DataError or HostError, the same on all ranks, with the command that exports a
    checkpoint by hand.
    """
    checkpoints.finish()
    answer: dict[str, Any] = {}
    if checkpoints.ranks.is_first:
        try:
            checkpoint = find_best(checkpoints, best)
            _check_memory(num_parameters)
            log.info("exporting %s, the best checkpoint", checkpoint.folder)
            export_checkpoint(checkpoint, checkpoints.config, target, choice)
        except StokerError as error:
            is_host = isinstance(error, HostError)
            other = checkpoints.folder_of(best.step) if is_host else checkpoints.newest
            text = (
                f"the best checkpoint, of step {best.step}, is not exported: {error}. "
                f"Nothing was exported. This exports {'it' if is_host else 'the last one'}: stoker-export --checkpoint {other} "
                f"--out {target}"
            )
            answer = {"text": text, "is_host": is_host}
    answer = json_of_first_rank(answer, checkpoints.ranks)
    if answer:
        raise (HostError if answer["is_host"] else DataError)(answer["text"])


def _check_memory(num_parameters: int) -> None:
    """Raises HostError where the host, or the job's limit, has too little left: the kernel would kill the run at its very end."""
    needed, free = _BYTES * num_parameters, available_bytes()
    if needed > free:
        raise HostError(
            f"this takes {needed / 1e9:.3g} GB of host memory ({_BYTES} bytes per parameter), and {free / 1e9:.3g} GB are free"
        )


def find_best(checkpoints: Checkpoints, best: Best) -> Checkpoint:
    """The checkpoint that was written after the best validation. Raises DataError where it is gone, or is another run's."""
    folder = checkpoints.folder_of(best.step)
    found = read_checkpoint(folder)
    said = found.state.get("best") or {}
    if (said.get("metric"), said.get("step"), said.get("value")) != (best.metric, best.step, best.value):
        raise DataError(
            f"it is not the checkpoint of the best {best.metric}, {best.value:.6g}: another run wrote it",
            file=str(folder),
        )
    return found
