"""`trainer.loss.type` -> the loss: ours by name, a user's class by dotted path (`my_package.losses:Focal`)."""

from __future__ import annotations

import importlib

from stoker_proto.config import LossConfig
from stoker_proto.errors import ConfigError
from stoker_proto.processor import Processor
from trainer.losses.interface import TokenLoss

LOSSES: dict[str, str] = {
    "cross_entropy": "trainer.losses.cross_entropy:CrossEntropy",
    "ordinal": "trainer.losses.ordinal:Ordinal",
}
"""type -> module:class, imported on demand."""


def make_loss(config: LossConfig, processor: Processor) -> TokenLoss:
    """The loss that the config names. Raises ConfigError."""
    target = LOSSES.get(config.type, config.type)
    module, colon, name = target.partition(":")
    if not colon:
        raise ConfigError(
            f"trainer.loss.type is {config.type!r}: known are {', '.join(LOSSES)}; a class of your own is package.module:Class"
        )
    if config.options and config.type in LOSSES:
        raise ConfigError(f"trainer.loss.options are for a class of your own, and trainer.loss.type is {config.type}")
    try:
        made = getattr(importlib.import_module(module), name)(config, processor)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"trainer.loss.type is {config.type!r}: it cannot be made ({type(error).__name__}: {error}); a loss is a class "
            "that is called with (LossConfig, Processor), in a module that is installed or on PYTHONPATH"
        ) from error
    if not callable(made):
        raise ConfigError(f"trainer.loss.type is {config.type!r}: its objects cannot be called with (logits, targets)")
    loss: TokenLoss = made
    return loss
