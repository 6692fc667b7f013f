"""Changes of the config since a checkpoint was made, as lines for the log of a resume.

trainer.epochs: 3 -> 6
the learning rate of step 901 is 0.000101, 24 times the one before (0.0000042): the schedule is that of the new settings
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stoker_proto.config import Config
from stoker_proto.config.reader import config_from_tree, config_to_tree
from stoker_proto.errors import ConfigError
from trainer.checkpoints.state import Checkpoint
from trainer.engine.optimizer import count_steps, learning_rate

_OTHER_EACH_TIME = ("cluster.loader_addresses", "trainer.output_dir")
_ABSENT = "absent"
_JUMP = 1.5
"""Ratio of two learning rates that is worth a line; the schedule itself changes less in a step, but for the warm-up."""


def config_changes(checkpoint: Checkpoint, config: Config, num_samples: int) -> list[str]:
    """Lines that describe the changes; empty where there are none. num_samples: of an epoch."""
    then = dict(_leaves(checkpoint.state.get("config") or {}, ""))
    now = dict(_leaves(config_to_tree(config), ""))
    lines = [
        f"{key}: {then.get(key, _ABSENT)} -> {now.get(key, _ABSENT)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key, _ABSENT) != now.get(key, _ABSENT)
        and not key.startswith(_OTHER_EACH_TIME)
        and not (key not in then and now[key] is None)  # a key that is newer than the checkpoint, not set
    ]
    return lines + _rate_jump(checkpoint, config, num_samples) if lines else []


def _rate_jump(checkpoint: Checkpoint, config: Config, num_samples: int) -> list[str]:
    try:
        before = config_from_tree(checkpoint.state["config"]).trainer
    except ConfigError:  # written by a version with other keys
        return []
    step = checkpoint.cursor.step
    old = learning_rate(before, step, count_steps(before, num_samples))
    new = learning_rate(config.trainer, step, count_steps(config.trainer, num_samples))
    if old == new or (old and 1 / _JUMP <= new / old <= _JUMP):
        return []
    times = f"{new / old:.3g} times" if old else "instead of"
    return [
        f"the learning rate of step {step + 1} is {new:.3g}, {times} the {old:.3g} that it would have been: the schedule "
        "is that of the new settings"
    ]


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
