"""`trainer/main.py --check`: the gates before a training, with the processor that the loaders send."""

from __future__ import annotations

import os
from pathlib import Path

from stoker_proto.config import Config
from stoker_proto.host.hub_cache import find_model_folder
from stoker_proto.processor import Processor
from trainer.evals.registry import plan_evals
from trainer.feed.feed import Feed
from trainer.sim.replay.command import ReplayOptions, check_demonstrations, jsonl_files
from trainer.sim.replay.recordings import read_recordings
from trainer.sim.workers import Interrupts


def check_run(config: Config) -> bool:
    """Whether nothing speaks against the training; prints what was found. The first rank checks, the others return at once.

    Environments of your own come from `env_modules` of the `success` entries in `trainer.evals`.
    Raises ConfigError, DataError, RefusedError, DeadlineError.
    """
    if os.environ.get("RANK", "0") != "0":
        return True
    plan_evals(config)
    feed = Feed(config, "train", 0, 1)
    try:
        info = feed.connect()
    finally:
        feed.close()
    processor = Processor.from_json(
        info.processor_json, find_model_folder(config.model.base_model_path) / "tokenizer.json"
    )
    print(f"loaders: {info.num_samples} samples an epoch")
    files = jsonl_files(config.data.paths("train"))
    reason = _nothing_to_replay(processor, files)
    if reason:
        print(f"demonstrations are not replayed: {reason}")
        return True
    modules = [name for entry in config.trainer.evals for name in entry.get("env_modules", ())]
    with Interrupts() as interrupts:
        options = ReplayOptions(env_modules=tuple(dict.fromkeys(modules)), skip_unknown=True)
        return check_demonstrations(files, processor, interrupts, options)


def _nothing_to_replay(processor: Processor, files: list[Path]) -> str:
    """Why there is nothing to replay; "" if there is something."""
    if processor.codec is None:
        return "the training has no actions"
    if not files:
        return "the training data are no JSONL files on this machine"
    if not read_recordings(files, 1).episodes:
        return "no row has a task and a seed"
    return ""
