"""Converts a checkpoint for another number of ranks, through DeepSpeed's universal checkpoint.

    universal/zero/{name of a parameter}/  fp32.pt exp_avg.pt exp_avg_sq.pt   the whole tensors, written by DeepSpeed's converter
                                           ema.pt                             with `trainer.ema_decay`: its average

DeepSpeed's converter knows AdamW's own states only. So it runs a second time on files whose weights are the averages.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stoker_proto.errors import DataError, DeadlineError
from stoker_proto.host.files import whole_folder
from trainer.engine.optimizer import EMA
from trainer.engine.ranks import Ranks
from trainer.engine.zero import Engine

log = logging.getLogger(__name__)

DEADLINE_S = 3600.0
"""How long the other ranks wait for the first rank's conversion."""


def convert(source: Path, target: Path, ranks: Ranks, *, averages: bool = False) -> None:
    """Write the universal form to the folder `target` on the first rank; the others wait. Raises DataError, DeadlineError.

    averages: the checkpoint has averages of the weights (`trainer.ema_decay`).
    """
    if ranks.is_first and not target.is_dir():
        log.info("converting %s for another number of ranks", source)
        with whole_folder(target, unfinished=target.with_name(target.name + ".partial")) as folder:
            run_conversion(source, folder)
            if averages:
                _add_averages(source, folder)
    deadline = time.monotonic() + DEADLINE_S
    while not target.is_dir():
        if time.monotonic() > deadline:
            raise DeadlineError(f"{target} is not there after {DEADLINE_S:.0f} s: see the first rank's messages")
        time.sleep(0.2)


def run_conversion(source: Path, target: Path, converter: str = "deepspeed.checkpoint.ds_to_universal") -> None:
    """Run DeepSpeed's own converter, a module. Raises DataError with the last line of its output."""
    command = [sys.executable, "-m", converter]
    command += ["--input_folder", str(source), "--output_folder", str(target), "--inject_missing_state"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # a checkout need not be installed
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"the conversion to a universal checkpoint failed: {last}", file=str(source))


def _add_averages(source: Path, folder: Path) -> None:
    """Write the averages beside the trained weights. Raises DataError."""
    second = folder / "averages"
    run_conversion(source, second, "trainer.engine.averages")
    for moment in sorted((folder / "zero").glob("*/exp_avg.pt")):  # frozen parameters have none
        (second / "zero" / moment.parent.name / "fp32.pt").rename(moment.with_name(f"{EMA}.pt"))
    shutil.rmtree(second)


def load_averages(engine: Engine, folder: Path) -> None:
    """Load this rank's parts of the averages from the universal form in `folder`, for ZeRO-3.

    Under stages 1 and 2 DeepSpeed loads every file of a parameter; under stage 3 only those of AdamW's own states.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() != 3:
        return
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        average, start = torch.zeros_like(flat), 0
        for parameter in parameters:
            name = optimizer.param_names[parameter]
            part = optimizer.load_hp_checkpoint_state(str(folder / "zero" / name), EMA, param=parameter)
            average[start : start + part.numel()] = part
            start += part.numel()
        inner_optimizer(engine).state[flat][EMA] = average


def inner_optimizer(engine: Engine) -> torch.optim.Optimizer:
    """torch's AdamW inside DeepSpeed's optimizer."""
    optimizer: torch.optim.Optimizer = engine.optimizer.optimizer
    return optimizer


def group_values(engine: Engine) -> list[dict[str, Any]]:
    """Weight decay, betas and the like of each parameter group."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in inner_optimizer(engine).param_groups
    ]


def repair_optimizer(engine: Engine, groups: Sequence[Mapping[str, Any]]) -> None:
    """Correct the parameter groups (decay, no decay) after DeepSpeed 0.19 has loaded a universal checkpoint.

    DeepSpeed gives all groups the first one's values, weight decay among them. It also gives them one shared step counter, which
    then goes up by two per step and falsifies AdamW's bias correction. groups: the values before loading.
    """
    optimizer = inner_optimizer(engine)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        group.update(values)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
