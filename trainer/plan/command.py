"""`--plan` of the trainer: options -> plan -> stdout."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DeadlineError
from stoker_proto.host.hub_cache import find_model_folder
from stoker_proto.processor import Processor
from trainer.feed.feed import Feed
from trainer.plan.report import Known, as_text, make_plan

log = logging.getLogger(__name__)
_ANSWER_S = 10.0
"""How long loaders may take to answer before the plan is made without them."""


def print_plan(config: Config, options: argparse.Namespace) -> int:
    """Print the plan; returns the exit code 0. Raises ConfigError."""
    for name in ("samples", "labels", "samples_per_second", "loader_samples_per_second"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be above 0")
    known = Known(
        samples=options.samples,
        labels=options.labels,
        samples_per_second=options.samples_per_second,
        loader_samples_per_second=options.loader_samples_per_second,
    )
    if options.samples is None and config.cluster.loader_addresses:
        known = ask_loaders(config, known)
    plan = make_plan(config, known)
    print(json.dumps(plan) if options.json else as_text(plan))
    return 0


def ask_loaders(config: Config, known: Known) -> Known:
    """`known`, with what the loaders say of the data; without it if they do not answer. Raises RefusedError, ConfigError."""
    patient = config.trainer.feed
    short = replace(patient, connect_deadline_s=min(_ANSWER_S, patient.connect_deadline_s))
    feed = Feed(replace(config, trainer=replace(config.trainer, feed=short)), "train", 0, 1)
    try:
        info = feed.connect()
    except DeadlineError as error:
        log.warning("the loaders do not answer, so steps are not known: %s", error)
        return known
    finally:
        feed.close()
    tokenizer = find_model_folder(config.model.base_model_path) / "tokenizer.json"
    processor = Processor.from_json(info.processor_json, tokenizer)
    return replace(known, samples=info.num_samples, vocab_size_needed=processor.vocab_size_needed)
