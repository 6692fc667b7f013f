"""What a rank holds loaders to before it has met one."""

from __future__ import annotations

from collections.abc import Mapping

from stoker_proto.config import Config
from stoker_proto.errors import RefusedError
from stoker_proto.order.lanes import order_fingerprint


def order_pins(config: Config, pins: Mapping[str, str]) -> dict[str, str]:
    """The pins of a checkpoint, and the order that the config says. Raises RefusedError if these differ."""
    order = order_fingerprint(config.data)
    if pins.get("order", order) != order:
        raise RefusedError(
            "data.order, the sources or their weights are not those of the checkpoint, or its rows were packed or grouped "
            "otherwise, so its position means another row: set them back, or start anew with trainer.checkpoint.resume=null"
        )
    return {**pins, "order": order}
