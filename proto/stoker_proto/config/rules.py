"""What numbers of the file may be: which keys must lie where."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stoker_proto.errors import ConfigError

if TYPE_CHECKING:
    from stoker_proto.config.root import Config

_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "it must be at least 1",
        lambda number: number >= 1,
        "cluster.num_nodes data.max_seq_len data.action.chunk data.order.lanes data.order.window_records data.order.cell "
        "data.order.window_rows data.image.depth_max_mm loader.cache_mb loader.unread_mb trainer.micro_batch_size "
        "trainer.global_batch_size trainer.epochs trainer.feed.prefetch trainer.feed.hedge_multiple trainer.checkpoint.keep "
        "trainer.logger.log_interval",
    ),
    (
        "it must not be negative",
        lambda number: number >= 0,
        "data.order.seed data.bad_sample_budget loader.cores loader.workers loader.threads trainer.eval_interval "
        "trainer.feed.backoff_s trainer.checkpoint.interval trainer.grad_clip trainer.weight_decay trainer.max_skipped_steps",
    ),
    (
        "it must lie in [0, 1]",
        lambda number: 0 <= number <= 1,
        "data.augment.brightness data.augment.contrast data.augment.saturation trainer.feed.hedge_share trainer.warmup_ratio "
        "trainer.min_lr_ratio",
    ),
    (
        "it must be above 0",
        lambda number: number > 0,
        "trainer.lr data.augment.crop_area trainer.feed.ticket_deadline_s trainer.feed.data_deadline_s "
        "trainer.feed.connect_deadline_s",
    ),
    ("a share of the image, at most 1", lambda number: number <= 1, "data.augment.crop_area"),
    ("JPEG quality lies in 1-100", lambda number: 1 <= number <= 100, "data.image.quality"),
    (
        "it must be above 1, or 0 for no takeover",
        lambda number: number == 0 or number > 1,
        "trainer.feed.takeover_ratio",
    ),
    ("at least 1, or null for all epochs", lambda number: number is None or number >= 1, "trainer.max_steps"),
)


def check_ranges(config: Config) -> None:
    """Raises ConfigError with the key, its value and the rule."""
    for rule, holds, keys in _RULES:
        for key in keys.split():
            value: Any = config
            for name in key.split("."):
                value = getattr(value, name)
            if not holds(value):
                raise ConfigError(f"{key} is {value}: {rule}")
