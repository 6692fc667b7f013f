"""The whole file: its sections, and the rules between keys."""

from __future__ import annotations

from dataclasses import dataclass, field

from stoker_proto.config.cluster import ClusterConfig
from stoker_proto.config.data import DataConfig
from stoker_proto.config.loader import LoaderConfig
from stoker_proto.config.model import ModelConfig
from stoker_proto.config.rules import check_ranges
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
        """Check ranges and the rules between keys. Raises ConfigError with the values, the rule and the way out."""
        check_ranges(self)
        self.data.check_sources()
        self.data.remote.check()
        self.cluster.security.check()
        self.cluster.check()
        world_size = len(self.cluster.component_placement.trainer)
        if world_size:
            check_batch_arithmetic(self.trainer.global_batch_size, self.trainer.micro_batch_size, world_size)
        has_validations = (self.data.paths("val") and self.trainer.eval_interval) or self.trainer.evals
        best = self.trainer.checkpoint.best
        if best is not None and not has_validations:
            raise ConfigError(
                "trainer.checkpoint.best needs validations: set data.val_data_paths and trainer.eval_interval, or trainer.evals, "
                "or leave it out"
            )
        if best is not None:
            _ = best.larger_is_better  # raises
        if self.trainer.min_lr_ratio and self.trainer.lr_schedule == "constant":
            raise ConfigError(
                f"trainer.min_lr_ratio is {self.trainer.min_lr_ratio} and trainer.lr_schedule is constant, which keeps to lr: "
                "take the cosine, or leave min_lr_ratio out"
            )
        if self.trainer.reduce_dtype == "bf16" and self.model.precision == "fp32":
            raise ConfigError(
                "trainer.reduce_dtype is bf16 and model.precision is fp32, whose gradients are added up in fp32: set "
                "precision to bf16, or leave reduce_dtype out"
            )
        profile = self.trainer.profile
        if profile is not None and profile.stop <= profile.start:
            raise ConfigError(
                f"trainer.profile is the steps from {profile.start} to before {profile.stop}, which are none: raise stop"
            )
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
        action = self.data.action
        if action.codec == "fast" and not action.learn_padding:
            raise ConfigError(
                "data.action.learn_padding is false and data.action.codec is fast, whose tokens each tell of the whole chunk: "
                "use vq or bins, or learn the padding"
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
