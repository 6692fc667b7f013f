"""The whole file, and the rules between its keys."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_proto.config.cluster import ClusterConfig
from stoker_proto.config.data import DataConfig
from stoker_proto.config.loader import LoaderConfig
from stoker_proto.config.model import ModelConfig
from stoker_proto.config.trainer import TrainerConfig, check_batch_arithmetic
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    model: ModelConfig
    data: DataConfig
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    trainer: TrainerConfig

    def check(self) -> None:
        """Rules between keys. Raises ConfigError with the values, the rule and the way out."""
        self._check_ranges()
        self.cluster.security.check()
        world_size = len(self.cluster.component_placement.trainer)
        if world_size:
            check_batch_arithmetic(self.trainer.global_batch_size, self.trainer.micro_batch_size, world_size)
        dialogue = self.data.dialogue
        if (dialogue.template == "custom") != (dialogue.user is not None):
            raise ConfigError(
                f"data.dialogue.user is {dialogue.user!r} and data.dialogue.template is {dialogue.template!r}: "
                "`user` goes with `template: custom` and only with it"
            )
        if self.data.packing and self.data.group_by_length:
            raise ConfigError(
                "data.packing and data.group_by_length are both true: packed rows are all about max_seq_len tokens long, take one"
            )
        self._check_state()

    def _check_state(self) -> None:
        state, dialogue = self.data.state, self.data.dialogue
        if state == "text" and dialogue.template == "openvla":
            raise ConfigError(
                "data.state is text and data.dialogue.template is openvla, which has no place for it: use stoker, "
                "chat_template, or custom with {state}"
            )
        if dialogue.user is not None and ("{state}" in dialogue.user) != (state == "text"):
            raise ConfigError(
                f"data.state is {state} and data.dialogue.user is {dialogue.user!r}: {{state}} stands in it with "
                "data.state=text, and only then"
            )

    def _check_ranges(self) -> None:
        data, trainer = self.data, self.trainer
        at_least_one = {
            "cluster.num_nodes": self.cluster.num_nodes,
            "data.max_seq_len": data.max_seq_len,
            "data.action.chunk": data.action.chunk,
            "data.order.lanes": data.order.lanes,
            "data.order.window_records": data.order.window_records,
            "data.order.cell": data.order.cell,
            "data.order.window_rows": data.order.window_rows,
            "data.image.depth_max_mm": data.image.depth_max_mm,
            "loader.cache_mb": self.loader.cache_mb,
            "loader.unread_mb": self.loader.unread_mb,
            "trainer.micro_batch_size": trainer.micro_batch_size,
            "trainer.global_batch_size": trainer.global_batch_size,
            "trainer.epochs": trainer.epochs,
            "trainer.feed.prefetch": trainer.feed.prefetch,
            "trainer.checkpoint.keep": trainer.checkpoint.keep,
            "trainer.logger.log_interval": trainer.logger.log_interval,
        }
        for key, value in at_least_one.items():
            if value < 1:
                raise ConfigError(f"{key} is {value}: it must be at least 1")
        not_negative = {
            "data.order.seed": data.order.seed,
            "data.bad_sample_budget": data.bad_sample_budget,
            "loader.cores": self.loader.cores,
            "loader.workers": self.loader.workers,
            "loader.threads": self.loader.threads,
            "trainer.eval_interval": trainer.eval_interval,
            "trainer.feed.backoff_s": trainer.feed.backoff_s,
            "trainer.checkpoint.interval": trainer.checkpoint.interval,
            "trainer.grad_clip": trainer.grad_clip,
            "trainer.weight_decay": trainer.weight_decay,
            "trainer.max_skipped_steps": trainer.max_skipped_steps,
        }
        for key, number in not_negative.items():
            if number < 0:
                raise ConfigError(f"{key} is {number}: it must not be negative")
        shares = {
            "data.augment.brightness": data.augment.brightness,
            "data.augment.contrast": data.augment.contrast,
            "data.augment.saturation": data.augment.saturation,
            "trainer.feed.hedge_share": trainer.feed.hedge_share,
            "trainer.warmup_ratio": trainer.warmup_ratio,
            "trainer.min_lr_ratio": trainer.min_lr_ratio,
        }
        for key, share in shares.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"{key} is {share}: it must lie in [0, 1]")
        above_zero = {
            "trainer.lr": trainer.lr,
            "data.augment.crop_area": data.augment.crop_area,
            "trainer.feed.ticket_deadline_s": trainer.feed.ticket_deadline_s,
            "trainer.feed.data_deadline_s": trainer.feed.data_deadline_s,
            "trainer.feed.connect_deadline_s": trainer.feed.connect_deadline_s,
        }
        for key, positive in above_zero.items():
            if not positive > 0:
                raise ConfigError(f"{key} is {positive}: it must be above 0")
        feed = trainer.feed
        if not feed.hedge_multiple >= 1:
            raise ConfigError(f"trainer.feed.hedge_multiple is {feed.hedge_multiple}: it must be at least 1")
        if not (feed.takeover_ratio == 0 or feed.takeover_ratio > 1):
            raise ConfigError(
                f"trainer.feed.takeover_ratio is {feed.takeover_ratio}: it must be above 1, or 0 for no takeover"
            )
        if data.augment.crop_area > 1:
            raise ConfigError(f"data.augment.crop_area is {data.augment.crop_area}: a share of the image, at most 1")
        if not 1 <= data.image.quality <= 100:
            raise ConfigError(f"data.image.quality is {data.image.quality}: JPEG quality lies in 1-100")
        data.check_sources()
        data.remote.check()
        if trainer.max_steps is not None and trainer.max_steps < 1:
            raise ConfigError(f"trainer.max_steps is {trainer.max_steps}: at least 1, or null for all epochs")
