"""The state file of a checkpoint, `stoker.json`, and the rules by which a run may resume from it.

    {"format": 2, "serial": 3, "world_size": 2, "global_batch_size": 16, "zero_stage": 3, "precision": "bf16", "seed": 0,
     "cursor": {"step": 500, "epoch": 1, "sample": 1408, "position": 8000, "skipped_steps": 0, "bad_samples": 0,
                "source_samples": [8000], "num_images": [1, 1]},
     "fingerprints": {"codec": "d45e31a8...", "manifest/train/0": "28146f26...", ...}, "config": {...}, "versions": {...}}

The random generators are a function of (seed, step, rank), see `step.seed_step`, so the cursor holds their state too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.config.reader import config_to_tree
from stoker_proto.errors import ConfigError, DataError, RefusedError, located
from stoker_proto.host.hub_cache import find_model_folder

log = logging.getLogger(__name__)

FORMAT = 2
STATE_FILE = "stoker.json"
_NAMES = {"serial", "world_size", "cursor", "fingerprints", "global_batch_size", "zero_stage", "precision", "seed"}
_OPTIONAL = {"lora", "base_weights", "freeze", "parameter_groups", "ema"}
"""Settings that must not change either, and that a state has only where the run has them."""
_END_BYTES = 1 << 20
_HARMLESS = ("image_libraries", "manifest/val/", "files/val/")
"""Fingerprints that may change between two runs: the first changes few pixels, the second no training row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where the training stands. No other position is kept anywhere."""

    step: int = 0
    """Optimizer steps done."""
    epoch: int = 0
    sample: int = 0
    """Next position in the epoch's stream."""
    position: int = 0
    """Samples trained since the beginning, over all epochs."""
    skipped_steps: int = 0
    """Steps whose gradient norm was not finite."""
    bad_samples: int = 0
    """Samples that came without labels because they are bad."""
    source_samples: tuple[int, ...] = ()
    """Samples trained of each source since the beginning."""
    num_images: tuple[int, int] | None = None
    """Fewest and most images of a sample with an action so far; None: there was none, or an older version trained it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, and the content of its stoker.json."""

    folder: Path
    state: dict[str, Any]

    @property
    def cursor(self) -> Cursor:
        """Where its run stood."""
        cursor = self.state["cursor"]
        images = cursor.get("num_images")
        tuples = {"source_samples": tuple(cursor["source_samples"]), "num_images": images and tuple(images)}
        return Cursor(**{**cursor, **tuples})

    @property
    def pins(self) -> dict[str, str]:
        """Fingerprints that the loaders must have when a run resumes from here."""
        found: dict[str, str] = self.state["fingerprints"]
        return {name: value for name, value in found.items() if not name.startswith(_HARMLESS)}

    @property
    def serial(self) -> int:
        """The larger, the newer."""
        return int(self.state["serial"])

    @property
    def world_size(self) -> int:
        """Ranks that wrote it."""
        return int(self.state["world_size"])


def state_of_run(
    config: Config, world_size: int, serial: int, cursor: Cursor, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """The content of stoker.json."""
    return {
        "format": FORMAT,
        "serial": serial,
        "world_size": world_size,
        **_fixed(config),
        "cursor": asdict(cursor),
        "fingerprints": dict(fingerprints),
        "config": config_to_tree(config),
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "numpy")
        },
    }


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises DataError."""
    path = folder / STATE_FILE
    with located(file=str(path)):
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found = state["format"]
            missing = _NAMES - state.keys()
            Cursor(**state.get("cursor", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not the state of a checkpoint ({error!r}): delete its folder to do without it") from error
        if found != FORMAT or missing:
            raise DataError(
                f"format {found}, this program reads {FORMAT}: resume with the version that wrote it, or start anew with "
                "another trainer.output_dir, or delete its folder to do without it"
            )
    return Checkpoint(folder=folder, state=state)


def check_resumable(checkpoint: Checkpoint, config: Config, world_size: int, fingerprints: Mapping[str, str]) -> None:
    """Check that a run may resume from the checkpoint. Raises RefusedError, ConfigError."""
    _check_fingerprints(checkpoint, fingerprints)
    fixed = _fixed(config)
    for name in (*fixed, *(_OPTIONAL - fixed.keys())):
        then, now = checkpoint.state.get(name), fixed.get(name)
        if then != now:
            raise ConfigError(
                f"{checkpoint.folder}: made with {name} {then}, this run has {now}: set it back, or start anew with "
                "trainer.checkpoint.resume=null"
            )
    if checkpoint.world_size != world_size and not config.trainer.checkpoint.universal:
        raise ConfigError(
            f"{checkpoint.folder}: made by {checkpoint.world_size} ranks, this run has {world_size}: start as many, or convert "
            "it with trainer.checkpoint.universal=true"
        )


def _check_fingerprints(checkpoint: Checkpoint, ours: Mapping[str, str]) -> None:
    """Compare fingerprints. A name that only one side has counts if it names training data: one entry more is other data."""
    theirs: dict[str, str] = checkpoint.state["fingerprints"]
    names = (theirs.keys() & ours.keys()) | {
        name for name in theirs.keys() ^ ours.keys() if name.startswith("manifest/")
    }
    differing = sorted(name for name in names if theirs.get(name) != ours.get(name))
    changes = {name: f"{name} {theirs.get(name, 'none')[:12]} -> {ours.get(name, 'none')[:12]}" for name in differing}
    grave = [change for name, change in changes.items() if not name.startswith(_HARMLESS)]
    if grave:
        raise RefusedError(
            f"{checkpoint.folder}: made with other data or another meaning of it ({', '.join(grave)}): give the loaders what "
            "they had, or start anew with trainer.checkpoint.resume=null"
        )
    if changes:
        log.warning("since %s was made: %s", checkpoint.folder, ", ".join(changes.values()))


def _fixed(config: Config) -> dict[str, Any]:
    """Settings that must not change within a lineage of checkpoints."""
    trainer = config.trainer
    found: dict[str, Any] = {
        "global_batch_size": trainer.global_batch_size,
        "zero_stage": trainer.zero_stage,
        "precision": config.model.precision,
        "seed": trainer.seed,
    }
    if config.model.lora is not None:
        adapters = asdict(config.model.lora)
        del adapters["export"]
        found["lora"] = {**adapters, "targets": list(adapters["targets"])}
        found["base_weights"] = weights_fingerprint(
            find_model_folder(config.model.base_model_path)
        )  # they are not in the checkpoint
    if config.model.freeze:
        found["freeze"] = list(config.model.freeze)
    if trainer.parameter_groups:
        found["parameter_groups"] = [list(group.match) for group in trainer.parameter_groups]
    if trainer.ema_decay:
        found["ema"] = True
    return found


def weights_fingerprint(folder: Path) -> str:
    """Of the base model's weights: names, sizes and both ends of the files, so that 14 GB need not be read."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with file.open("rb") as content:
            digest.update(content.read(_END_BYTES))
            content.seek(max(0, size - _END_BYTES))
            digest.update(content.read(_END_BYTES))
    return digest.hexdigest()
