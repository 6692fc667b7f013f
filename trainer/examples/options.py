"""The command line of the examples."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker_proto.config import Config
from stoker_proto.config.reader import add_config_arguments, load_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an example is to do."""

    config: Config
    out: Path
    steps: int
    save_every: int


def read_options(argv: Sequence[str] | None, description: str) -> Options:
    """From the command line. Raises ConfigError."""
    parser = argparse.ArgumentParser(description=description)
    add_config_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and the model")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument(
        "--save-every", type=int, default=100, help="steps between two checkpoints; default: %(default)s"
    )
    known = parser.parse_args(argv)
    config = load_config(known.config, known.set)
    return Options(config=config, out=known.out, steps=known.steps, save_every=known.save_every)
