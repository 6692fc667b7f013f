"""A checkpoint whose files are written beside the training: copied to host memory first, written by a thread.

    rank 0   copy | train ... ; thread: write, sync, mark | wait for all marks, stoker.json, rename, prune
    rank 1   copy | train ... ; thread: write, sync, mark

No rank waits for another one's disk. Ranks report to the first one through marks in the unfinished folder. A collective would
need all ranks at the same point of the training. The folder gets its name last, so a crash at any time leaves the former
checkpoint.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from stoker_proto.errors import HostError
from stoker_proto.host.files import sync
from trainer.engine.host_memory import available_bytes
from trainer.engine.ranks import Ranks
from trainer.engine.universal import inner_optimizer
from trainer.engine.zero import Engine

_WRITTEN, _FAILED = ".written", ".failed"
"""Ends of the marks' names, after the rank's number."""
_SHARE = 0.5
"""Of the free host memory that copies may take."""
_LOOK_S = 0.05


class HeldFiles:
    """Stands in for DeepSpeed's `checkpoint_engine`: keeps copies of what is to be written."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._files: list[tuple[Path, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Keep a copy for `write`."""
        self._files.append((Path(path), copy_to_host(state_dict, {})))

    def write(self) -> None:
        """Write the files and wait until they are on the disk; each copy is dropped after that. Raises OSError, RuntimeError."""
        while self._files:
            path, state = self._files.pop(0)
            self._real.save(state, str(path))
            sync(path)


@contextmanager
def held_back(engine: Engine) -> Iterator[HeldFiles]:
    """Inside, what DeepSpeed would write is copied to host memory instead."""
    real = engine.checkpoint_engine
    held = HeldFiles(real)
    engine.checkpoint_engine = held
    try:
        yield held
    finally:
        engine.checkpoint_engine = real


def copy_to_host(value: Any, known: dict[Any, torch.Tensor]) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors lie in host memory of their own.

    known: tensors copied so far; views of the same numbers stay views of the same copy, so tied weights are written once.
    """
    if isinstance(value, torch.Tensor):
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() == 0 or key not in known:
            known[key] = value.detach().to("cpu", copy=True)
        return known[key]
    if isinstance(value, dict):
        copied = {name: copy_to_host(item, known) for name, item in value.items()}
        return copied if type(value) is dict else _like(value, copied)
    if type(value) in (list, tuple):
        return type(value)(copy_to_host(item, known) for item in value)
    return value


def _like(value: Mapping[Any, Any], copied: dict[Any, Any]) -> Any:
    """A dict of the type of `value`, such as an OrderedDict."""
    made = type(value)()
    made.update(copied)  # type: ignore[attr-defined]
    return made


def memory_of_copy(engine: Engine, *, adapters_only: bool = False) -> tuple[int, int]:
    """(bytes that a copy of this rank's part of a checkpoint takes, most bytes that it may take).

    It may take half of this rank's share of the memory that is left. adapters_only: frozen weights are not in the checkpoint.
    """
    optimizer = inner_optimizer(engine)
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found += getattr(engine.optimizer, "fp32_partitioned_groups_flat", [])  # ZeRO-3 takes them out of the groups
    found += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    weights = [p for p in engine.module.parameters() if p.requires_grad or not adapters_only]
    found += [getattr(parameter, "ds_tensor", parameter) for parameter in weights]
    needed: int = sum(tensor.nbytes for tensor in found)
    return needed, int(_SHARE * available_bytes() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class BackgroundWriting:
    """One checkpoint on its way to the disk."""

    def __init__(self, target: Path, work: Callable[[], None]) -> None:
        self.target = target
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  (a thread's edge: `result` raises it)
            self._error = error

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error."""
        return self._error is not None

    def wait(self, timeout_s: float | None = None) -> Exception | None:
        """Wait for the end; the error of this rank's part, if it had one."""
        self._thread.join(timeout_s)
        return self._error


def mark(partial: Path, rank: int, error: Exception | None) -> None:
    """Tell the first rank that this rank's files are on the disk, or why they are not."""
    if error is None:
        (partial / f"{rank}{_WRITTEN}").touch()
    else:
        failed = partial / f"{rank}{_FAILED}"
        failed.touch()
        with suppress(OSError):  # a full disk has room for the name alone; this rank logs the reason itself
            failed.write_text(str(error), encoding="utf-8")


def wait_for_marks(partial: Path, ranks: Ranks, deadline_s: float) -> None:
    """Wait until all ranks' files are on the disk, and remove the marks. Raises HostError."""
    end = time.monotonic() + deadline_s
    missing = list(range(ranks.world_size))
    while missing:
        for rank in missing:
            if (failed := partial / f"{rank}{_FAILED}").exists():
                raise HostError(
                    f"rank {rank} could not write its part of {partial}: {failed.read_text(encoding='utf-8')}"
                )
        missing = [rank for rank in missing if not (partial / f"{rank}{_WRITTEN}").exists()]
        if missing and time.monotonic() > end:
            raise HostError(
                f"{partial}: ranks {', '.join(map(str, missing))} have not written their parts after {deadline_s:g} s "
                "(trainer.collective_timeout_s): is trainer.output_dir storage that all machines share?"
            )
        time.sleep(_LOOK_S if missing else 0)
    for rank in range(ranks.world_size):
        (partial / f"{rank}{_WRITTEN}").unlink()
