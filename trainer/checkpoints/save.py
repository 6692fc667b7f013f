"""A checkpoint: what a resume needs, in one folder that is either whole or not there.

    {output_dir}/checkpoints/step-00000500/
        stoker.json            the cursor, fingerprints, config, versions: see `trainer.checkpoints.state`
        processor/             the one object that turns observations into tokens and tokens into actions
        deepspeed/             DeepSpeed's own: weights and optimizer states of every rank; with LoRA those of the adapters
        universal/             made when a run resumes on another number of ranks

With `trainer.checkpoint.background` the ranks copy their parts to host memory, and threads write them: `background` beside this.

A checkpoint is written under a name ending in `.partial` and renamed when all ranks are done and the disks have it, so it is
whole even after a power failure. The newest checkpoint is the one with the largest serial number, not the largest step: after
a resume from an older checkpoint, later steps of the first run belong to another lineage. With several nodes, `output_dir` must
be storage that all of them share.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError, HostError
from stoker_proto.host.files import sync, sync_tree
from stoker_proto.processor import Processor
from trainer.checkpoints.background import (
    BackgroundWriting,
    HeldFiles,
    held_back,
    mark,
    memory_of_copy,
    wait_for_marks,
)
from trainer.checkpoints.state import STATE_FILE, Checkpoint, Cursor, check_resumable, read_checkpoint, state_of_run
from trainer.checkpoints.write_errors import writing
from trainer.engine.ranks import Ranks, gather_json, json_of_first_rank, max_over_ranks, wait_for_all_ranks
from trainer.engine.universal import convert, group_values, load_averages, repair_optimizer
from trainer.engine.zero import Engine

log = logging.getLogger(__name__)

_TAG, _UNIVERSAL = "deepspeed", "universal"
_PARTIAL = ".partial"
_SEEN_DEADLINE_S = 60.0
"""For a checkpoint that the first rank sees to be seen by the others."""
_DELETED = ".deleted"
"""Suffix of a folder that is no longer a checkpoint and still has to be removed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What the first rank adds to DeepSpeed's files."""

    cursor: Cursor
    fingerprints: Mapping[str, str]
    processor: Processor
    extra: Mapping[str, Any]
    """More of stoker.json."""


class Checkpoints:
    """All checkpoints in one `output_dir`. Every rank calls `save`, `finish`, `convert` and `load`."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.folder = Path(config.trainer.output_dir) / "checkpoints"
        self.newest: Path | None = None
        """The checkpoint that this run wrote last, or resumed from."""
        self._resumed: Path | None = None
        self._writing: BackgroundWriting | None = None
        self._fits: bool | None = None
        """What `trainer.checkpoint.background: auto` decided last."""

    @property
    def resume_hint(self) -> str:
        """Text: from where the same command resumes if the run ends now."""
        resume = self.config.trainer.checkpoint.resume
        if self.newest is None:
            return "no checkpoint was written yet (trainer.checkpoint.interval), so the same command starts anew"
        is_found = resume == "auto" or (resume is not None and Path(resume) == self.newest)
        how = "the same command" if is_found else "the same command with trainer.checkpoint.resume=auto"
        return f"the newest checkpoint is {self.newest}, and {how} resumes from it"

    def find(self) -> Checkpoint | None:
        """The checkpoint to resume from, by `trainer.checkpoint.resume`; every rank calls it. Raises ConfigError, DataError.

        The first rank chooses it for all ranks. Otherwise a stale listing of a network file system, or separate disks, could make
        ranks resume from different steps. All raise the first one's error.
        """
        answer: dict[str, Any] = {}
        if self.ranks.is_first:
            try:
                found = self._choose()
                answer = {} if found is None else {"folder": str(found.folder), "state": found.state}
            except (ConfigError, DataError) as error:
                answer = {"error": str(error), "is_data": isinstance(error, DataError)}
        answer = json_of_first_rank(answer, self.ranks)
        if "error" in answer:
            raise (DataError if answer["is_data"] else ConfigError)(answer["error"])
        if not answer:
            return None
        self._check_all_see(Path(answer["folder"]))
        return Checkpoint(folder=Path(answer["folder"]), state=answer["state"])

    def _check_all_see(self, folder: Path) -> None:
        """Raises ConfigError, the same on all ranks, if a rank does not see the checkpoint."""
        deadline = time.monotonic() + _SEEN_DEADLINE_S  # a network's file system may show it late
        while not (is_there := (folder / STATE_FILE).is_file()) and time.monotonic() < deadline:
            time.sleep(0.2)
        blind = [rank for rank, seen in enumerate(gather_json(is_there, self.ranks)) if not seen]
        if blind:
            raise ConfigError(
                f"ranks {', '.join(map(str, blind))} do not see {folder}, from which the first rank would resume: "
                "trainer.output_dir must be storage that all machines share"
            )

    def _choose(self) -> Checkpoint | None:
        """The first rank's choice. Raises ConfigError, DataError.

        All checkpoints in `output_dir` must be readable, also if the run does not resume: it will write among them.
        """
        resume = self.config.trainer.checkpoint.resume
        whole = [read_checkpoint(path) for path in self._folders()]
        if resume is None:
            return None
        if resume == "auto":
            return max(whole, key=lambda checkpoint: checkpoint.serial, default=None)
        folder = Path(resume)
        if not (folder / STATE_FILE).is_file():
            raise ConfigError(
                f"trainer.checkpoint.resume is {resume!r}: there is no {folder / STATE_FILE}; name a folder such as "
                f"{self.folder / 'step-00000500'}, or auto, or null"
            )
        return read_checkpoint(folder)

    def check(self, checkpoint: Checkpoint, fingerprints: Mapping[str, str]) -> None:
        """This run may resume from the checkpoint. Raises RefusedError, ConfigError."""
        check_resumable(checkpoint, self.config, self.ranks.world_size, fingerprints)

    def needs_universal(self, checkpoint: Checkpoint) -> bool:
        """Whether `load` reads the universal form; the engine must be built for it."""
        return checkpoint.world_size != self.ranks.world_size

    def convert(self, checkpoint: Checkpoint) -> None:
        """Make the universal form. Raises DataError, DeadlineError."""
        averages = bool(self.config.trainer.ema_decay)
        convert(checkpoint.folder / _TAG, checkpoint.folder / _UNIVERSAL, self.ranks, averages=averages)

    def save(
        self,
        engine: Engine,
        cursor: Cursor,
        fingerprints: Mapping[str, str],
        processor: Processor,
        extra: Mapping[str, Any] | None = None,
        *,
        background: bool = False,
    ) -> Path:
        """Write a checkpoint, and delete all but the newest `keep` and the best; returns its folder.

        extra: more of stoker.json: `scores`, `best`. background: return when the state is copied, if
        `trainer.checkpoint.background` allows it; the folder has its name after `finish`. Raises HostError for a full disk, also
        one that the former checkpoint met.
        """
        self.finish()
        target = self.folder / _name_of(cursor.step)
        contents = Contents(cursor=cursor, fingerprints=fingerprints, processor=processor, extra=extra or {})
        behind = background and self._may_write_behind(engine)
        with writing(target):
            partial = self._begin(target)
            if behind:
                with held_back(engine) as held:
                    self._save_engine(engine, partial)
                self._writing = BackgroundWriting(target, lambda: self._write_behind(held, target, partial, contents))
            else:
                self._save_engine(engine, partial)
                wait_for_all_ranks()
                if self.ranks.is_first_of_machine:  # what its ranks wrote may still be in this machine's memory
                    sync_tree(partial)
                wait_for_all_ranks()
                if self.ranks.is_first:
                    self._complete(target, partial, contents)
                wait_for_all_ranks()
                self.newest = target
        return target

    @property
    def has_failed(self) -> bool:
        """Whether this rank's part of the checkpoint that is being written met an error; `finish` raises it."""
        return self._writing is not None and self._writing.has_failed

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is whole; every rank calls it. Raises HostError on all ranks."""
        if self._writing is None:
            return
        started, current = time.monotonic(), self._writing
        error = current.wait()
        self._writing = None
        errors = gather_json("" if error is None else str(error) or repr(error), self.ranks)
        if error is not None:
            raise error
        for rank, text in enumerate(errors):
            if text:
                raise HostError(f"rank {rank} could not write {current.target}: {text}")
        self.newest = current.target
        if (waited_s := time.monotonic() - started) > 1:
            log.info("training waited %.1f s for %s to be whole", waited_s, current.target)

    def wait_alone(self, timeout_s: float) -> None:
        """After a failure of the run: let the checkpoint that is being written finish, without the other ranks."""
        if self._writing is not None and (error := self._writing.wait(timeout_s)) is not None:
            log.warning("%s is not whole: %s", self._writing.target, error)

    def _may_write_behind(self, engine: Engine) -> bool:
        """The same on all ranks: `auto` is true where each has the memory for a copy. Its decision is logged when it changes."""
        wanted = self.config.trainer.checkpoint.background
        if wanted != "auto":
            return wanted
        needed, most = memory_of_copy(engine, adapters_only=self.config.model.lora is not None)
        too_large, largest, least = max_over_ranks([float(needed > most), float(needed), -float(most)], self.ranks)
        fits = not too_large
        if fits != self._fits:
            self._fits = fits
            log.info(
                "trainer.checkpoint.background=auto: checkpoints are written %s: the copy of a rank takes up to %.3f GB, and may "
                "take %.3f GB, half of its share of the free host memory",
                *("beside the training" if fits else "while the training waits", largest / 1e9, -least / 1e9),
            )
        return fits

    def _begin(self, target: Path) -> Path:
        """The unfinished folder, which all ranks may write to when this returns."""
        partial = target.with_name(target.name + _PARTIAL)
        if self.ranks.is_first:
            self._sweep()
            partial.mkdir(parents=True)
        wait_for_all_ranks()
        return partial

    def _save_engine(self, engine: Engine, partial: Path) -> None:
        adapters_only = {} if self.config.model.lora is None else {"exclude_frozen_parameters": True}
        engine.save_checkpoint(str(partial), tag=_TAG, **adapters_only)

    def _write_behind(self, held: HeldFiles, target: Path, partial: Path, contents: Contents) -> None:
        """In a thread of each rank. Raises HostError."""
        with writing(target):
            try:
                held.write()
            except Exception as error:
                mark(partial, self.ranks.rank, error)
                raise
            mark(partial, self.ranks.rank, None)
            if self.ranks.is_first:
                wait_for_marks(partial, self.ranks, self.config.trainer.collective_timeout_s)
                sync_tree(partial)  # DeepSpeed's small files, and the names
                self._complete(target, partial, contents)
                self.newest = target
                log.info("step %d: checkpoint %s is whole", contents.cursor.step, target)

    def _complete(self, target: Path, partial: Path, contents: Contents) -> None:
        """The first rank's part once all files of DeepSpeed are on the disk: its own files, the name, old checkpoints."""
        contents.processor.save(partial / "processor")
        serial = 1 + max((checkpoint.serial for checkpoint in self._readable()), default=0)
        state = state_of_run(self.config, self.ranks.world_size, serial, contents.cursor, contents.fingerprints)
        text = json.dumps(state | dict(contents.extra), indent=1)
        (partial / STATE_FILE).write_text(text, encoding="utf-8")
        sync_tree(partial / "processor")
        sync(partial / STATE_FILE)
        sync(partial)
        if target.exists():  # from another lineage, or from a lost run that had reached this step
            _hide(target)
        partial.rename(target)
        sync(self.folder)
        self._prune()

    def load(self, engine: Engine, checkpoint: Checkpoint) -> None:
        """Load weights and optimizer states into the engine; weight decay, betas and so on stay those of the config."""
        tag = _UNIVERSAL if self.needs_universal(checkpoint) else _TAG
        values = group_values(engine)
        adapters_only = {} if self.config.model.lora is None else {"load_module_strict": False}
        path, _ = engine.load_checkpoint(str(checkpoint.folder), tag=tag, **adapters_only)
        if path is None:
            raise DataError(
                "DeepSpeed finds nothing to load: the checkpoint is damaged", file=str(checkpoint.folder / tag)
            )
        if tag == _UNIVERSAL and self.config.trainer.ema_decay:
            load_averages(engine, checkpoint.folder / tag)
        repair_optimizer(engine, values)
        self.newest = self._resumed = checkpoint.folder

    def folder_of(self, step: int) -> Path:
        """Where this run's checkpoint of a step is, or should be: it may lie beside the one that the run resumed from."""
        name = _name_of(step)
        folders = [self.folder / name]
        if self._resumed is not None:
            folders.append(self._resumed.parent / name)
        return next((folder for folder in folders if (folder / STATE_FILE).is_file()), folders[0])

    def _folders(self) -> list[Path]:
        folders = sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []
        return [path for path in folders if not path.suffix and (path / STATE_FILE).is_file()]

    def _readable(self) -> list[Checkpoint]:
        """All readable checkpoints. One that was damaged since the start must not end a run."""
        found = []
        for path in self._folders():
            try:
                found.append(read_checkpoint(path))
            except DataError as error:
                log.warning("a checkpoint is left alone: %s", error)
        return found

    def _prune(self) -> None:
        """Delete old checkpoints. The new one is whole, so no error here may end the run."""
        newest_first = sorted(self._readable(), key=lambda checkpoint: -checkpoint.serial)
        best = None if self.config.trainer.checkpoint.best is None else newest_first[0].state.get("best")
        for checkpoint in newest_first[self.config.trainer.checkpoint.keep :]:
            if best and best["step"] == checkpoint.cursor.step:
                continue
            try:
                _hide(checkpoint.folder)
            except OSError as error:
                log.warning("%s is kept, as it cannot be renamed: %s", checkpoint.folder, error)
        for hidden in self.folder.glob(f"step-*{_DELETED}"):
            _remove(hidden)

    def _sweep(self) -> None:
        """Remove what killed runs left half written or half removed."""
        for suffix in (_PARTIAL, _DELETED):
            for left in self.folder.glob(f"step-*{suffix}"):
                _remove(left)


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _hide(folder: Path) -> None:
    """Rename a folder away, so that a deletion cut short leaves no half folder under a whole one's name."""
    hidden = (folder.with_name(f"{folder.name}.{n}{_DELETED}") for n in count())
    folder.rename(next(path for path in hidden if not path.exists()))


def _remove(folder: Path) -> None:
    """Remove a folder that is no longer needed. One that cannot be removed must not end a run."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be removed (%s): the next checkpoint tries again", folder, error)
