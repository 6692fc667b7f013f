"""What a resume needs, in one folder that is either whole or not there.

    {output_dir}/checkpoints/step-00000500/
        stoker.json            the cursor, fingerprints, config, versions: see `trainer.checkpoints.state`
        processor/             the one object that turns observations into tokens and tokens into actions
        deepspeed/             DeepSpeed's own: weights and optimizer states of every rank
        universal/             made when it is resumed on another number of ranks

A checkpoint is written under a name ending in `.partial` and renamed when all ranks are done and the disks have it, so that
this holds after a power failure too. The newest is the one with
the largest serial number, not the largest step: after a resume from an older one, what was before it is of another
lineage. With several nodes `output_dir` must be storage that all of them share.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.files import sync, sync_tree
from stoker_proto.processor import Processor
from trainer.checkpoints.state import STATE_FILE, Cursor, Saved, check_resumable, describe, read_saved
from trainer.engine.ranks import Ranks, wait_for_all_ranks
from trainer.engine.universal import convert, group_values, repair_optimizer
from trainer.engine.zero import Engine

log = logging.getLogger(__name__)

_TAG, _UNIVERSAL = "deepspeed", "universal"
_PARTIAL = ".partial"
_DELETED = ".deleted"
"""Suffix of a folder that is no longer a checkpoint and still has to be removed."""


class Checkpoints:
    """The checkpoints of one run. Every rank calls `save`, `convert` and `load`."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.folder = Path(config.trainer.output_dir) / "checkpoints"
        self.newest: Path | None = None
        """What this run wrote last, or was resumed from."""

    @property
    def way_back(self) -> str:
        """In words: what a start of the same command makes of a run that ends here."""
        resume = self.config.trainer.checkpoint.resume
        if self.newest is None:
            return "no checkpoint was written yet (trainer.checkpoint.interval), so the same command starts anew"
        is_found = resume == "auto" or (resume is not None and Path(resume) == self.newest)
        how = "the same command" if is_found else "the same command with trainer.checkpoint.resume=auto"
        return f"the newest checkpoint is {self.newest}, and {how} resumes from it"

    def find(self) -> Saved | None:
        """The checkpoint to resume from, by `trainer.checkpoint.resume`. Raises ConfigError, DataError.

        All in `output_dir` must be readable, also where none of them is wanted: this run's are to stand among them.
        """
        resume = self.config.trainer.checkpoint.resume
        whole = [read_saved(path) for path in self._folders()]
        if resume is None:
            return None
        if resume == "auto":
            return max(whole, key=lambda saved: saved.serial, default=None)
        folder = Path(resume)
        if not (folder / STATE_FILE).is_file():
            raise ConfigError(
                f"trainer.checkpoint.resume is {resume!r}: there is no {folder / STATE_FILE}; name a folder such as "
                f"{self.folder / 'step-00000500'}, or auto, or null"
            )
        return read_saved(folder)

    def check(self, saved: Saved, fingerprints: Mapping[str, str]) -> None:
        """This run goes on with what the checkpoint's run did. Raises RefusedError, ConfigError."""
        check_resumable(saved, self.config, self.ranks.world_size, fingerprints)

    def needs_universal(self, saved: Saved) -> bool:
        """Whether `load` takes the way over the universal form; the engine must be built for it."""
        return saved.world_size != self.ranks.world_size

    def convert(self, saved: Saved) -> None:
        """Make the universal form. Raises DataError, DeadlineError."""
        convert(saved.folder / _TAG, saved.folder / _UNIVERSAL, self.ranks)

    def save(self, engine: Engine, cursor: Cursor, fingerprints: Mapping[str, str], processor: Processor) -> Path:
        """Write a checkpoint; gives its folder. Older ones than `keep` are deleted."""
        target = self.folder / f"step-{cursor.step:08d}"
        partial = target.with_name(target.name + _PARTIAL)
        if self.ranks.is_first:
            self._sweep()
            partial.mkdir(parents=True)
        wait_for_all_ranks()
        engine.save_checkpoint(str(partial), tag=_TAG)
        wait_for_all_ranks()
        if self.ranks.is_first_of_machine:  # what its ranks wrote may still be in this machine's memory
            sync_tree(partial)
        wait_for_all_ranks()
        if self.ranks.is_first:
            processor.save(partial / "processor")
            serial = 1 + max((saved.serial for saved in self._readable()), default=0)
            state = describe(self.config, self.ranks.world_size, serial, cursor, fingerprints)
            (partial / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            sync_tree(partial / "processor")
            sync(partial / STATE_FILE)
            sync(partial)
            if target.exists():  # of another lineage, or of a lost run that came this far
                _hide(target)
            partial.rename(target)
            sync(self.folder)
            self._prune()
        wait_for_all_ranks()
        self.newest = target
        return target

    def load(self, engine: Engine, saved: Saved) -> None:
        """Give the engine its weights and optimizer states back; weight decay, betas and so on are the config's."""
        tag = _UNIVERSAL if self.needs_universal(saved) else _TAG
        values = group_values(engine)
        path, _ = engine.load_checkpoint(str(saved.folder), tag=tag)
        if path is None:
            raise DataError("DeepSpeed finds nothing to load: the checkpoint is damaged", file=str(saved.folder / tag))
        repair_optimizer(engine, values)
        self.newest = saved.folder

    def _folders(self) -> list[Path]:
        folders = sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []
        return [path for path in folders if not path.suffix and (path / STATE_FILE).is_file()]

    def _readable(self) -> list[Saved]:
        """A neighbour that was damaged since the start is no reason to lose a run."""
        found = []
        for path in self._folders():
            try:
                found.append(read_saved(path))
            except DataError as error:
                log.warning("a checkpoint is left alone: %s", error)
        return found

    def _prune(self) -> None:
        """The new checkpoint is whole: nothing that goes wrong here is worth the run."""
        newest_first = sorted(self._readable(), key=lambda saved: -saved.serial)
        for saved in newest_first[self.config.trainer.checkpoint.keep :]:
            try:
                _hide(saved.folder)
            except OSError as error:
                log.warning("%s is kept, as it cannot be renamed: %s", saved.folder, error)
        for hidden in self.folder.glob(f"step-*{_DELETED}"):
            _remove(hidden)

    def _sweep(self) -> None:
        """What runs that were killed left half written or half removed."""
        for suffix in (_PARTIAL, _DELETED):
            for left in self.folder.glob(f"step-*{suffix}"):
                _remove(left)


def _hide(folder: Path) -> None:
    """Rename a folder away, so that a deletion cut short leaves no half folder under a whole one's name."""
    hidden = (folder.with_name(f"{folder.name}.{n}{_DELETED}") for n in count())
    folder.rename(next(path for path in hidden if not path.exists()))


def _remove(folder: Path) -> None:
    """Remove a folder that nobody needs. One that cannot be removed must not end a run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be removed (%s): the next checkpoint tries again", folder, error)
