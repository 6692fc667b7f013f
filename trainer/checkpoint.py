"""What a resume needs, in one folder that is either whole or not there.

    {output_dir}/checkpoints/step-00000500/
        stoker.json            the cursor, fingerprints, config, versions: see below
        processor/             the one object that turns observations into tokens and tokens into actions
        deepspeed/             DeepSpeed's own: weights and optimizer states of every rank
        universal/             made when it is resumed on another number of ranks

    {"format": 1, "serial": 3, "world_size": 2, "global_batch_size": 16, "zero_stage": 3, "precision": "bf16", "seed": 0,
     "cursor": {"step": 500, "epoch": 1, "sample": 1408, "position": 8000, "skipped_steps": 0, "bad_samples": 0},
     "fingerprints": {...}, "config": {...}, "versions": {...}}

A checkpoint is written under a name ending in `.partial` and renamed when all ranks are done. The newest is the one with
the largest serial number, not the largest step: after a resume from an older one, what was before it is of another
lineage. The random generators are a function of (seed, step, rank), see `step.seed_step`: their state is in the cursor.
With several nodes `output_dir` must be storage that all of them share.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from stoker_proto.config import Config
from stoker_proto.config_reader import config_to_tree
from stoker_proto.errors import ConfigError, DataError, DeadlineError, RefusedError, located
from stoker_proto.processor import Processor
from trainer.zero import Engine, Ranks

log = logging.getLogger(__name__)

FORMAT = 1
_TAG, _UNIVERSAL, _PARTIAL, _STATE = "deepspeed", "universal", ".partial", "stoker.json"
_CONVERSION_DEADLINE_S = 3600.0
_NAMES = {"serial", "world_size", "cursor", "fingerprints", "global_batch_size", "zero_stage", "precision", "seed"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """Where the training stands: the only position that is kept anywhere."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that was found, and what its stoker.json says."""

    folder: Path
    state: dict[str, Any]

    @property
    def cursor(self) -> Cursor:
        """Where it stands."""
        return Cursor(**self.state["cursor"])


class Checkpoints:
    """The checkpoints of one run. Every rank calls `save` and `load`."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.folder = Path(config.trainer.output_dir) / "checkpoints"

    def find(self) -> Saved | None:
        """The checkpoint to resume from, by `trainer.checkpoint.resume`. Raises ConfigError, DataError."""
        resume = self.config.trainer.checkpoint.resume
        if resume is None:
            return None
        if resume == "auto":
            return max(self._whole(), key=lambda saved: int(saved.state["serial"]), default=None)
        folder = Path(resume)
        if not (folder / _STATE).is_file():
            raise ConfigError(
                f"trainer.checkpoint.resume is {resume!r}: there is no {folder / _STATE}; name a folder such as "
                f"{self.folder / 'step-00000500'}, or auto, or null"
            )
        return Saved(folder=folder, state=_read_state(folder))

    def check(self, saved: Saved, fingerprints: Mapping[str, str]) -> None:
        """This run goes on with what the checkpoint's run did. Raises RefusedError, ConfigError."""
        theirs: dict[str, str] = saved.state["fingerprints"]
        differing = sorted(name for name in theirs.keys() & fingerprints.keys() if theirs[name] != fingerprints[name])
        if differing:
            changes = ", ".join(f"{name} {theirs[name][:12]} -> {fingerprints[name][:12]}" for name in differing)
            raise RefusedError(
                f"{saved.folder}: made with other data or another meaning of it ({changes}): give the loaders what they had, "
                "or start anew with trainer.checkpoint.resume=null"
            )
        for name, now in self._fixed().items():
            if saved.state[name] != now:
                raise ConfigError(
                    f"{saved.folder}: made with {name} {saved.state[name]}, this run has {now}: set it back, or start anew "
                    "with trainer.checkpoint.resume=null"
                )
        if saved.state["world_size"] != self.ranks.world_size and not self.config.trainer.checkpoint.universal:
            raise ConfigError(
                f"{saved.folder}: made by {saved.state['world_size']} ranks, this run has {self.ranks.world_size}: start as "
                "many, or convert it with trainer.checkpoint.universal=true"
            )

    def needs_universal(self, saved: Saved) -> bool:
        """Whether `load` takes the way over the universal form; the engine must be built for it."""
        return bool(saved.state["world_size"] != self.ranks.world_size)

    def save(self, engine: Engine, cursor: Cursor, fingerprints: Mapping[str, str], processor: Processor) -> Path:
        """Write a checkpoint; gives its folder. Older ones than `keep` are deleted."""
        target = self.folder / f"step-{cursor.step:08d}"
        partial = target.with_name(target.name + _PARTIAL)
        if self.ranks.is_first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(partial), tag=_TAG)
        if self.ranks.is_first:
            processor.save(partial / "processor")
            state = {
                "format": FORMAT,
                "serial": 1 + max((int(saved.state["serial"]) for saved in self._whole()), default=0),
                "world_size": self.ranks.world_size,
                **self._fixed(),
                "cursor": asdict(cursor),
                "fingerprints": dict(fingerprints),
                "config": config_to_tree(self.config),
                "versions": _versions(),
            }
            _write_durably(partial / _STATE, json.dumps(state, indent=1))
            self._publish(partial, target)
            self._prune()
        dist.barrier()
        return target

    def load(self, engine: Engine, saved: Saved) -> None:
        """Give the engine its weights and optimizer states back."""
        tag = _UNIVERSAL if self.needs_universal(saved) else _TAG
        path, _ = engine.load_checkpoint(str(saved.folder), tag=tag)
        if path is None:
            raise DataError("DeepSpeed finds nothing to load: the checkpoint is damaged", file=str(saved.folder / tag))
        unshare_step_counts(engine)

    def convert(self, saved: Saved) -> None:
        """Make the universal form, on the first rank; the others wait for it."""
        target = saved.folder / _UNIVERSAL
        if self.ranks.is_first and not target.is_dir():
            log.info("converting %s for another number of ranks", saved.folder)
            partial = target.with_name(target.name + _PARTIAL)
            shutil.rmtree(partial, ignore_errors=True)
            run_conversion(saved.folder / _TAG, partial)
            partial.rename(target)
        deadline = time.monotonic() + _CONVERSION_DEADLINE_S
        while not target.is_dir():
            if time.monotonic() > deadline:
                raise DeadlineError(
                    f"{target} is not there after {_CONVERSION_DEADLINE_S:.0f} s: see the first rank's messages"
                )
            time.sleep(0.2)

    def _fixed(self) -> dict[str, Any]:
        trainer = self.config.trainer
        return {
            "global_batch_size": trainer.global_batch_size,
            "zero_stage": trainer.zero_stage,
            "precision": self.config.model.precision,
            "seed": trainer.seed,
        }

    def _whole(self) -> list[Saved]:
        folders = sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []
        whole = [path for path in folders if path.suffix != _PARTIAL and (path / _STATE).is_file()]
        return [Saved(folder=path, state=_read_state(path)) for path in whole]

    def _publish(self, partial: Path, target: Path) -> None:
        if target.exists():  # of another lineage, or of a lost run that came this far
            _delete(target)
        partial.rename(target)
        _sync_folder(target.parent)

    def _prune(self) -> None:
        newest_first = sorted(self._whole(), key=lambda saved: -int(saved.state["serial"]))
        for saved in newest_first[self.config.trainer.checkpoint.keep :]:
            _delete(saved.folder)


def unshare_step_counts(engine: Engine) -> None:
    """Give every group of parameters its own count of AdamW's steps.

    DeepSpeed 0.19 loads a universal checkpoint with one tensor as the count of all groups: with two groups (decay, no
    decay) it would go up by two per step, and the bias correction would be another than without the stop.
    """
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def run_conversion(source: Path, target: Path) -> None:
    """DeepSpeed's own converter. Raises DataError with the last line of what it said."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(source), "--output_folder", str(target), "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"the conversion to a universal checkpoint failed: {last}", file=str(source))


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / _STATE
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
                "trainer.checkpoint.resume=null"
            )
    return state


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "numpy")}


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _delete(folder: Path) -> None:
    """First out of sight, then away: a deletion cut short leaves no half checkpoint under a whole one's name."""
    hidden = folder.with_name(folder.name + _PARTIAL)
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)
