"""Names of evaluations -> classes, and the entries of `trainer.evals` -> evaluations with their intervals."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError
from trainer.evals.interface import Eval

NAMES = {"perplexity": "trainer.evals.validation:Perplexity", "success": "trainer.sim.success:Success"}
"""Type -> "module:class", imported when it is used."""


@dataclass(slots=True)
class Planned:
    """An evaluation, when it is due, and when it began last."""

    name: str
    eval: Eval
    interval: int
    """Optimizer steps; 0: at the last step only."""
    begun_at: int = -1


def plan_evals(config: Config) -> list[Planned]:
    """The evaluations of a run, the validation among them where there are validation data. Raises ConfigError.

    A `perplexity` among the entries takes the place of the one that `eval_interval` and `eval_samples` describe.
    """
    trainer = config.trainer
    names = [str(entry.get("name", entry.get("type"))) for entry in trainer.evals]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"trainer.evals: two entries are called {twice}, and their figures would be mixed: give one a name"
        )
    planned = [_plan(dict(entry), f"trainer.evals[{number}]", config) for number, entry in enumerate(trainer.evals)]
    if trainer.eval_interval and config.data.paths("val") and all(one.name != "perplexity" for one in planned):
        planned.insert(0, _plan({"type": "perplexity"}, "trainer.eval_interval", config))
    return planned


def _plan(entry: dict[str, Any], key: str, config: Config) -> Planned:
    kind, interval = entry.pop("type", None), entry.pop("interval", config.trainer.eval_interval)
    if not isinstance(kind, str):
        raise ConfigError(
            f"{key} has no type: write {{type: success, ...}}; known: {', '.join(NAMES)}, or package.module:Class"
        )
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 0:
        raise ConfigError(
            f"{key}.interval is {interval!r}: a number of optimizer steps is expected, 0 for the last one only"
        )
    return Planned(kind, _class_of(kind, key)(entry, config), interval)


def _class_of(kind: str, key: str) -> type[Eval]:
    """Raises ConfigError."""
    module, colon, name = NAMES.get(kind, kind).partition(":")
    if not colon:
        raise ConfigError(f"{key}.type is {kind!r}: known are {', '.join(NAMES)}, and package.module:Class of your own")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"{key}.type is {kind!r}: it cannot be imported ({error}); name package.module:Class"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Eval)):
        raise ConfigError(f"{key}.type is {kind!r}: that is no subclass of trainer.evals.interface.Eval")
    return found


def check_empty(options: Mapping[str, Any], kind: str) -> None:
    """Raises ConfigError for options that are left over."""
    if options:
        raise ConfigError(f"trainer.evals, type {kind}: unknown option {next(iter(options))!r}")
