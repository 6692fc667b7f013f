"""The one YAML that loaders and trainers read: its keys, their meaning, their defaults, their rules.

    cluster: {num_nodes: 1, component_placement: {trainer: 0-1, dataloader: 0-1}}
    model: {base_model_path: models/tiny-llava, gradient_checkpointing: true}
    data: {dataset_type: mani_openpi, train_data_paths: [demos/train.jsonl], val_data_paths: [demos/val.jsonl], max_seq_len: 512}
    trainer: {micro_batch_size: 4, global_batch_size: 16, lr: 2e-5, epochs: 3, eval_interval: 100, logger: {wandb: false}}

In: the YAML file and `--set` overrides. Out: one frozen `Config`. Read `root` (the sections and the rules between keys), then the
sections: `cluster` (with `placement` and `security`), `model`, `data` (with `samples`, `order` and `remote`),
`loader` and `trainer` (with `loss`). `rules` checks the ranges that fields state; `strict` and `reader` make dataclasses of YAML.
"""

from stoker_proto.config.cluster import ClusterConfig
from stoker_proto.config.data import DataConfig, SourceConfig
from stoker_proto.config.loader import LoaderConfig
from stoker_proto.config.loss import LossConfig
from stoker_proto.config.model import LoraConfig, ModelConfig
from stoker_proto.config.order import OrderConfig
from stoker_proto.config.remote import RemoteConfig
from stoker_proto.config.root import Config
from stoker_proto.config.samples import ActionConfig, AugmentConfig, DialogueConfig, ImageConfig
from stoker_proto.config.security import SecurityConfig
from stoker_proto.config.trainer import (
    BestConfig,
    CheckpointConfig,
    FeedConfig,
    LoggerConfig,
    ParameterGroupConfig,
    ProfileConfig,
    TrainerConfig,
    check_batch_arithmetic,
)

__all__ = [
    "ActionConfig",
    "AugmentConfig",
    "BestConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DialogueConfig",
    "FeedConfig",
    "ImageConfig",
    "LoaderConfig",
    "LoggerConfig",
    "LoraConfig",
    "LossConfig",
    "ModelConfig",
    "OrderConfig",
    "ParameterGroupConfig",
    "ProfileConfig",
    "RemoteConfig",
    "SecurityConfig",
    "SourceConfig",
    "TrainerConfig",
    "check_batch_arithmetic",
]
