"""Config -> Trainer: find a checkpoint, connect to the loaders, load the base model, and check that the three fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError, RefusedError
from stoker_proto.fleet.metrics import import_client
from stoker_proto.host.hub_cache import find_model_folder
from stoker_proto.images.transport_cost import log_choice
from stoker_proto.processor import Processor
from trainer.checkpoints.best import read_best
from trainer.checkpoints.changes import config_changes
from trainer.checkpoints.lock import lock_output_dir
from trainer.checkpoints.save import Checkpoints
from trainer.checkpoints.state import Checkpoint, Cursor
from trainer.engine.ranks import Ranks, find_differences
from trainer.engine.weight_files import check_files
from trainer.engine.zero import Engine, deepspeed_settings, join_ranks, wrap
from trainer.engine.zero_stage import with_zero_stage
from trainer.evals.registry import Planned, plan_evals
from trainer.evals.schedule import EvalSchedule
from trainer.feed.batch import Decoding
from trainer.feed.buffers import reused_memory
from trainer.feed.feed import Feed, FeedInfo
from trainer.loop import Trainer
from trainer.models.families import family_of, read_model_config
from trainer.models.loading import check_new_tokens, count_parameters, load_model, text_width
from trainer.models.lora import import_peft
from trainer.report.fleet import FleetReport
from trainer.report.trackers import Trackers, import_wandb
from trainer.training.chunk_check import prove_chunks
from trainer.training.flops import count_flops, peak_flops
from trainer.training.inputs import InputMaker
from trainer.training.mask_check import needs_no_mask, refuse_seeing_ahead
from trainer.training.objective import Objective
from trainer.training.packed import check_packing, wants_one_row
from trainer.training.source_table import SourceTable
from trainer.training.split import Split
from trainer.training.step import Stepper

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """What a run has once its feeds are connected."""

    train: Split
    val: Split | None
    processor: Processor
    """As the loaders sent it."""
    fingerprints: dict[str, str]
    """Of both splits; the checkpoint keeps them."""


def build_trainer(config: Config) -> Trainer:
    """The trainer, ready to run. Raises ConfigError, RefusedError, DeadlineError, DataError."""
    check_model_and_packages(config)  # before waiting for ranks or loaders
    evals = plan_evals(config)  # raises ConfigError for wrong ones
    ranks = join_ranks(config.trainer.collective_timeout_s)
    lock_output_dir(Path(config.trainer.output_dir), ranks)
    checkpoint = Checkpoints(config, ranks).find()
    config = with_zero_stage(config, ranks, None if checkpoint is None else checkpoint.state["zero_stage"])
    checkpoints = Checkpoints(config, ranks)
    feeds: list[Feed] = []
    try:
        train, info = open_split(config, "train", ranks, feeds, checkpoint)
        fingerprints, val = dict(info.fingerprints), None
        if config.data.paths("val"):
            val, val_info = open_split(config, "val", ranks, feeds, checkpoint)
            fingerprints |= val_info.fingerprints
        check_same_on_all_ranks(fingerprints, ranks)
        if checkpoint is not None:
            checkpoints.check(checkpoint, fingerprints)
        processor = Processor.from_json(
            info.processor_json, find_model_folder(config.model.base_model_path) / "tokenizer.json"
        )
        connected = Connected(train=train, val=val, processor=processor, fingerprints=fingerprints)
        trainer = assemble(config, ranks, connected, checkpoints, checkpoint, evals)
        if ranks.is_first:
            trainer.fleet = FleetReport(feeds[0], metrics=config.trainer.logger.metrics)
        return trainer
    except BaseException:
        for feed in feeds:
            feed.close()
        raise


def check_model_and_packages(config: Config) -> None:
    """Raises ConfigError for an impossible base model, and for a package that is not installed."""
    folder = find_model_folder(config.model.base_model_path)
    family_of(read_model_config(str(folder), config.model.trust_remote_code))
    check_files(folder)
    if config.model.lora is not None:
        import_peft()
    if config.trainer.logger.wandb:
        import_wandb()
    if config.trainer.logger.metrics is not None:
        import_client()


def open_split(
    config: Config, split: Literal["train", "val"], ranks: Ranks, feeds: list[Feed], checkpoint: Checkpoint | None
) -> tuple[Split, FeedInfo]:
    """Connect to the loaders of a split. The feed is also appended to `feeds`, so that the caller can close it after an error.

    checkpoint: to resume from. Each loader is compared with it, so that the error names the loader that differs from the
    checkpoint, not one that differs from the first loader.
    """
    allocate = pinned_memory if ranks.device.type == "cuda" else reused_memory
    pins = checkpoint.pins if checkpoint is not None else None
    feed = Feed(config, split, ranks.rank, ranks.world_size, pins=pins, decoding=Decoding(allocate=allocate))
    feeds.append(feed)
    try:
        info = feed.connect()
    except RefusedError as error:
        if checkpoint is None:
            raise
        raise RefusedError(
            f"{error}; {checkpoint.folder} is resumed, and loaders must have what it was made with: if that was changed on "
            "purpose, start anew with trainer.checkpoint.resume=null"
        ) from error
    if info.num_samples == 0:
        raise DataError(f"the {split} data paths hold no samples: name other files")
    if split == "train" and isinstance(feed.processor, Processor):
        log_choice(log, config.data.image, feed.processor.image)
    sources = SourceTable(config.data.source_names(), config.data.entry_sources(split), info.pass_samples)
    return Split(feed=feed, num_samples=info.num_samples, sources=sources), info


def check_same_on_all_ranks(fingerprints: dict[str, str], ranks: Ranks) -> None:
    """Each rank accepts what the first loader that answers it sends, and all ranks must have accepted the same. RefusedError."""
    differing = find_differences(fingerprints, ranks)
    if differing is not None:
        raise RefusedError(
            f"ranks were answered by loaders that differ in {', '.join(differing) or 'what they hold'}: start all loaders with "
            "the same config, data and version"
        )


def pinned_memory(shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """Pinned memory, from which the device copies while it computes. It returns to PyTorch's pool when the array is dropped."""
    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    array: NDArray[Any] = torch.empty(shape, dtype=kind, pin_memory=True).numpy()
    return array


def assemble(
    config: Config,
    ranks: Ranks,
    connected: Connected,
    checkpoints: Checkpoints,
    checkpoint: Checkpoint | None,
    evals: Sequence[Planned] | None = None,
) -> Trainer:
    """The trainer with connected feeds. evals: None: those of the config."""
    train, processor = connected.train, connected.processor
    engine = build_engine(config, ranks, processor, checkpoints, checkpoint)
    cursor = checkpoint.cursor if checkpoint is not None else Cursor(source_samples=(0,) * len(train.sources))
    if checkpoint is not None:
        log.info(
            "resumed from %s: step %d, epoch %d, sample %d", checkpoint.folder, cursor.step, cursor.epoch, cursor.sample
        )
        for change in config_changes(checkpoint, config, train.num_samples):
            log.warning("since the checkpoint: %s", change)
    model, image = engine.module, processor.image
    image_size = None if image is None else (image.height, image.width)
    stepper = build_stepper(engine, config, processor, ranks, train.sources)
    if ranks.device.type != "cpu":
        for split in (train, connected.val):
            if split is not None:
                split.feed.copy_ahead(stepper.make_inputs.copy)
    return Trainer(
        config=config,
        ranks=ranks,
        stepper=stepper,
        processor=processor,
        train=train,
        val=connected.val,
        evals=EvalSchedule(plan_evals(config) if evals is None else evals),
        fingerprints=connected.fingerprints,
        checkpoints=checkpoints,
        trackers=Trackers(config, is_first=ranks.is_first, first_step=cursor.step + 1),
        flops=count_flops(model, model.config, image_size),
        peak_flops=peak_flops(ranks.device),
        cursor=cursor,
        best=None if checkpoint is None else read_best(checkpoint.state, config.trainer.checkpoint.best),
    )


def build_engine(
    config: Config, ranks: Ranks, processor: Processor, checkpoints: Checkpoints, checkpoint: Checkpoint | None
) -> Engine:
    """The base model inside DeepSpeed, with the checkpoint's weights if there is one."""
    model_config = read_model_config(
        str(find_model_folder(config.model.base_model_path)), config.model.trust_remote_code
    )
    family = family_of(model_config)
    if family.sees_images and processor.image is None:
        raise ConfigError(
            f"model.base_model_path is {config.model.base_model_path!r}: the model sees images, but the loaders send none"
        )
    universal = checkpoint is not None and checkpoints.needs_universal(checkpoint)
    if checkpoint is not None and universal:
        checkpoints.convert(checkpoint)
    settings = deepspeed_settings(
        config, world_size=ranks.world_size, hidden_size=text_width(model_config), universal=universal
    )
    torch.manual_seed(config.trainer.seed)  # for weights of adapters
    model = load_model(config, family, settings, processor.vocab_size_needed)
    check_new_tokens(model, processor.vocabulary)
    trained = count_parameters(model, trained=True)
    log.info("%s: %d parameters, %d of them trained", type(model).__name__, count_parameters(model), trained)
    engine = wrap(model, config, settings)
    if checkpoint is not None:
        checkpoints.load(engine, checkpoint)
    return engine


def build_stepper(engine: Engine, config: Config, processor: Processor, ranks: Ranks, sources: SourceTable) -> Stepper:
    """The stepper of the engine. Raises ConfigError for a model that cannot train packed rows."""
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    make_inputs = InputMaker(processor, family_of(engine.module.config), ranks.device, dtype)
    objective = Objective.of(config.trainer.loss, processor)
    stepper = Stepper(engine, make_inputs, ranks, config.trainer.seed, sources, objective)
    refuse_seeing_ahead(stepper, processor)
    make_inputs.in_one_row = wants_one_row(config, processor, make_inputs.family)
    if config.data.packing:
        check_packing(stepper, processor)
    else:
        make_inputs.masks = not needs_no_mask(stepper, processor)
    stepper.chunks = prove_chunks(stepper, processor, config)
    return stepper
