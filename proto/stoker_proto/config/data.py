"""`data`: what is read, and how it becomes rows."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from stoker_proto.config.order import OrderConfig
from stoker_proto.config.remote import RemoteConfig
from stoker_proto.config.rules import at_least
from stoker_proto.config.samples import ActionConfig, AugmentConfig, DialogueConfig, ImageConfig
from stoker_proto.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """One of `data.sources`: a dataset, and how much of the mixture it is."""

    dataset_type: str
    """As `data.dataset_type`."""
    paths: tuple[str, ...]
    """As `data.train_data_paths`."""
    val_paths: tuple[str, ...] = ()
    """As `data.val_data_paths`."""
    weight: float | None = None
    """Its part of the mixture, against the weights of the others; all sources have one, or none has."""
    name: str | None = None
    """What its loss is called in the logs; default: its dataset_type, numbered where two have the same."""
    options: dict[str, Any] = field(default_factory=dict)
    """As `data.options`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes rows."""

    dataset_type: str = ""
    """`mani_openpi`, `lerobot`, `chat`, `code`, `text`, or `package.module:Class`: a subclass of
    `loader_service.sources.base.BaseSFTDataset`."""
    train_data_paths: tuple[str, ...] = ()
    """Files, folders or globs, here or behind URLs (`s3://bucket/demos/*.jsonl`, extra `stoker[remote]`). Each entry is a
    placement group: a loader holds all of it or nothing of it."""
    val_data_paths: tuple[str, ...] = ()
    """The same, for validation."""
    sources: tuple[SourceConfig, ...] = ()
    """Several datasets in one run, instead of the three keys above and `options`. Without weights every sample of every source
    is trained once per epoch; with weights an epoch is one pass over the source that lasts longest, and the others repeat,
    each pass in a new order."""
    weigh_by: Literal["samples", "tokens"] = "samples"
    """What the weights of `sources` are shares of: rows, or their tokens (of the rows' mean length, source by source)."""
    max_seq_len: int = field(metadata=at_least(1))
    """Tokens per row at most, images counted. A row with one answer is never cut: one that cannot fit is an error. Plain text
    is cut into as many rows as it needs."""
    overlong: Literal["error", "truncate", "drop_turns"] = "error"
    """Dialogues of several turns that need more than max_seq_len tokens: `error`: bad samples; `truncate`: cut at the end;
    `drop_turns`: without their oldest exchanges. What would have no label left, or lose an image, is a bad sample even so."""
    packing: bool = False
    """Several samples per row up to max_seq_len, no attention across them; of text whose tokens are counted, not of actions."""
    group_by_length: bool = False
    """Without packing: rows of one cell (`data.order.cell`) are of similar length, so that less of a batch is padding."""
    state: Literal["none", "text"] = "none"
    """`text`: the robot's state (joints, gripper) is told with the instruction, each number as one of 256 bins between its 1st
    and 99th percentile: `Task: push the cube, State: 12 200 128;`; with `custom` it stands where `{state}` does."""
    state_path: str | None = None
    """Take this scale of the states (`loader-prepare --state-out FILE`): needed where loaders hold different data."""
    data_root: str | None = None
    """Nothing outside this folder is read; default: the folder of the shard that names the file. A URL rules data behind URLs, a
    folder data that lies here."""
    cache_dir: str | None = None
    """Where manifests are kept; default: a `.stoker` folder beside the data. Copies of remote files lie in its `remote` folder;
    default: `~/.cache/stoker`."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    task_table: str | None = None
    """YAML file `task id: instruction`, added to (and before) the built-in table."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """`fail`: a bad sample ends the run with its name; `skip`: it keeps its place as a row without labels, and is counted."""
    bad_sample_budget: int = field(default=1000, metadata=at_least(0))
    """With `skip`: more bad samples than this in a run end it all the same."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed to the dataset as it stands; the dataset says what it takes."""
    image: ImageConfig = field(default_factory=ImageConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    action: ActionConfig = field(default_factory=ActionConfig)
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    order: OrderConfig = field(default_factory=OrderConfig)

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """`sources`, or the one that the short form names."""
        if self.sources:
            return self.sources
        return (
            SourceConfig(
                dataset_type=self.dataset_type,
                paths=self.train_data_paths,
                val_paths=self.val_data_paths,
                options=self.options,
            ),
        )

    def paths(self, split: str) -> tuple[str, ...]:
        """The entries of a split, source after source: entries are numbered by their place here."""
        return tuple(path for source in self.all_sources() for path in _paths_of(source, split))

    def entry_sources(self, split: str) -> tuple[int, ...]:
        """For each entry of a split the number of its source."""
        return tuple(n for n, source in enumerate(self.all_sources()) for _ in _paths_of(source, split))

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the sources; empty where they have none."""
        return tuple(source.weight for source in self.all_sources() if source.weight is not None)

    def of_source(self, number: int) -> DataConfig:
        """The same settings for one source alone, in the short form."""
        source = self.all_sources()[number]
        return dataclasses.replace(
            self,
            dataset_type=source.dataset_type,
            train_data_paths=source.paths,
            val_data_paths=source.val_paths,
            options=source.options,
            sources=(),
        )

    def path_key(self, split: str, entry: int) -> str:
        """The key of the file that names an entry, for messages."""
        if not self.sources:
            return f"data.{split}_data_paths[{entry}]"
        source = self.entry_sources(split)[entry]
        first = self.entry_sources(split).index(source)
        return f"data.sources[{source}].{'paths' if split == 'train' else 'val_paths'}[{entry - first}]"

    def source_names(self) -> tuple[str, ...]:
        """What each source is called, each name once."""
        names = [source.name or source.dataset_type.rpartition(":")[2] for source in self.all_sources()]
        return tuple(
            name if source.name or names.count(name) == 1 else f"{name}_{number}"
            for number, (name, source) in enumerate(zip(names, self.all_sources(), strict=True))
        )

    def check_sources(self) -> None:
        """Rules between the short form, `sources` and weights. Raises ConfigError."""
        if self.sources:
            short = {
                "dataset_type": self.dataset_type,
                "train_data_paths": self.train_data_paths,
                "val_data_paths": self.val_data_paths,
                "options": self.options,
            }
            for key, value in short.items():
                if value:
                    raise ConfigError(
                        f"data.{key} stands beside data.sources: move it into the source that it belongs to"
                    )
        elif not self.dataset_type:
            raise ConfigError("data.dataset_type is missing: name one, or list several under data.sources")
        for number, source in enumerate(self.all_sources()):
            prefix = f"data.sources[{number}]." if self.sources else "data."
            if not source.paths:
                key = "paths" if self.sources else "train_data_paths"
                raise ConfigError(f"{prefix}{key} is empty: name at least one file, folder or glob")
            if source.weight is not None and not source.weight > 0:
                raise ConfigError(
                    f"{prefix}weight is {source.weight}: it must be above 0; leave out a source not wanted"
                )
        without = [number for number, source in enumerate(self.sources) if source.weight is None]
        if 0 < len(without) < len(self.sources):
            raise ConfigError(f"data.sources[{without[0]}].weight is missing: give every source a weight, or none")
        names = self.source_names()
        for number, name in enumerate(names):
            if names.index(name) != number:
                raise ConfigError(f"data.sources[{number}].name is {name!r}, as that of another: give each its own")


def _paths_of(source: SourceConfig, split: str) -> tuple[str, ...]:
    return source.paths if split == "train" else source.val_paths
