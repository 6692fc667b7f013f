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
    """One of `data.sources`: a dataset and its share of the mixture."""

    dataset_type: str
    """As `data.dataset_type`."""
    paths: tuple[str, ...]
    """As `data.train_data_paths`."""
    val_paths: tuple[str, ...] = ()
    """As `data.val_data_paths`."""
    weight: float | None = None
    """Its share of the mixture, relative to the weights of the others. Either all sources have one or none has."""
    name: str | None = None
    """Name of its loss in the logs; default: its dataset_type, numbered where several sources have the same."""
    options: dict[str, Any] = field(default_factory=dict)
    """As `data.options`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """What is read, and how it becomes rows."""

    dataset_type: str = ""
    """`mani_openpi`, `lerobot`, `chat`, `code`, `text`, or `package.module:Class`: a subclass of
    `loader_service.sources.base.BaseSFTDataset`."""
    train_data_paths: tuple[str, ...] = ()
    """Files, folders or globs, local or behind URLs (`s3://bucket/demos/*.jsonl`, extra `stoker[remote]`). Each entry is a
    placement group: a loader holds all of it or none of it."""
    val_data_paths: tuple[str, ...] = ()
    """The same, for validation."""
    sources: tuple[SourceConfig, ...] = ()
    """Several datasets in one run, instead of the three keys above and `options`. Without weights an epoch trains every sample of
    every source once. With weights an epoch is one pass over the source that lasts longest; the others repeat, each pass in a
    new order."""
    weigh_by: Literal["samples", "tokens"] = "samples"
    """Whether the weights of `sources` are shares of rows or of tokens (rows times the mean row length of the source)."""
    max_seq_len: int = field(metadata=at_least(1))
    """Most tokens of a row, images included. A row with one answer is never cut: it is an error if it does not fit. Plain text
    is cut into as many rows as it needs."""
    overlong: Literal["error", "truncate", "drop_turns"] = "error"
    """What happens to dialogues of several turns that need more than max_seq_len tokens. `error`: they are bad samples;
    `truncate`: they are cut at the end; `drop_turns`: they lose their oldest exchanges. A dialogue that would keep no label, or
    lose an image, is a bad sample in any case."""
    packing: bool = False
    """Put several samples into a row, up to max_seq_len, without attention between them. For text; not for actions."""
    group_by_length: bool = False
    """Without packing: give the rows of one cell (`data.order.cell`) similar lengths, so that batches hold less padding."""
    state: Literal["none", "text"] = "none"
    """`text`: the instruction includes the robot's state (joints, gripper), each number as one of 256 bins between its 1st and
    99th percentile: `Task: push the cube, State: 12 200 128;`. With the template `custom` the state replaces `{state}`."""
    state_path: str | None = None
    """File with the statistics of the states (`loader-prepare --state-out FILE`). Needed where loaders hold different data."""
    data_root: str | None = None
    """Nothing outside this folder is read; default: the folder of the shard that names the file. A URL limits data behind URLs, a
    folder limits local data."""
    cache_dir: str | None = None
    """Folder of the manifests; default: a `.stoker` folder beside the data. Copies of remote files are in
    its `remote` folder; default: `~/.cache/stoker`."""
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    task_table: str | None = None
    """YAML file `task id: instruction`. Its entries take precedence over the built-in table."""
    on_bad_sample: Literal["fail", "skip"] = "fail"
    """`fail`: a bad sample ends the run with an error that names it; `skip`: it becomes a row without labels, and is counted."""
    bad_sample_budget: int = field(default=1000, metadata=at_least(0))
    """With `skip`: the run ends when it has met more bad samples than this."""
    exclude: str | None = None
    """File that names samples to train nothing of: they keep their places, without labels. Lines `ENTRY OFFSET SAMPLE FILE`, as
    `stoker-batch --worst-loss K --exclude-lines` writes them."""
    options: dict[str, Any] = field(default_factory=dict)
    """Passed unchanged to the dataset, which documents its options."""
    image: ImageConfig = field(default_factory=ImageConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    action: ActionConfig = field(default_factory=ActionConfig)
    dialogue: DialogueConfig = field(default_factory=DialogueConfig)
    order: OrderConfig = field(default_factory=OrderConfig)

    def all_sources(self) -> tuple[SourceConfig, ...]:
        """`sources`, or the one source of the short form."""
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
        """The entries of a split, source after source. An entry's number is its index here."""
        return tuple(path for source in self.all_sources() for path in _paths_of(source, split))

    def entry_sources(self, split: str) -> tuple[int, ...]:
        """The source number of each entry of a split."""
        return tuple(n for n, source in enumerate(self.all_sources()) for _ in _paths_of(source, split))

    @property
    def weights(self) -> tuple[float, ...]:
        """The sources' weights; empty where they have none."""
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
        """A different name for each source."""
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
