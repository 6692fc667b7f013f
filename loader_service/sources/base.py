"""The interface of a dataset: subclass `BaseSFTDataset` and name the class in `data.dataset_type`.

    class Captions(BaseSFTDataset):                    # data.dataset_type: my_package.captions:Captions
        def scan(self, shard):                         # cheap: once, by loader-prepare
            yield ScannedRecord(offset=0, size=..., num_samples=1)
        def read(self, shard, offset, size):           # the work: in the loader's workers, in any order
            yield Sample(instruction="what is this?", images=(frame,), answer="a cube")

`scan` says which records a shard holds and how many samples each gives; `read` gives exactly that many, always the same
ones. Both may run in several threads and processes at once: keep no state between calls.

A class with `__len__` and `__getitem__` needs neither: `scan` and `read` go through these (`indexed`).

    class Rows(BaseSFTDataset):
        def __init__(self, config):
            super().__init__(config)
            self.rows = [json.loads(line) for file in self.files for line in file.read_text().splitlines()]
        def __len__(self):
            return len(self.rows)
        def __getitem__(self, index):
            return {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loader_service.remote.shared_store import remote_store
from loader_service.remote.url import is_url
from loader_service.shards import EntryShards, locate_entry
from loader_service.sources.indexed import IndexedShards, is_indexed
from loader_service.sources.named_files import (
    NamedFiles as NamedFiles,
)  # so that a dataset class imports from here alone
from loader_service.sources.samples import RecordContent as RecordContent
from loader_service.sources.samples import Sample as Sample
from loader_service.sources.samples import ScannedRecord as ScannedRecord
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError
from stoker_proto.text.turns import Turn as Turn  # so that a dataset class imports from here alone

if TYPE_CHECKING:
    from loader_service.remote.store import RemoteStore

SOURCES: dict[str, str] = {
    "mani_openpi": "loader_service.sources.mani_openpi:ManiOpenPIDataset",
    "chat": "loader_service.sources.chat.dataset:ChatDataset",
    "code": "loader_service.sources.code:CodeDataset",
    "text": "loader_service.sources.text:TextDataset",
    "lerobot": "loader_service.sources.lerobot.dataset:LeRobotDataset",
}
"""dataset_type -> module:class, imported on demand."""


class BaseSFTDataset:
    """One kind of data on disk. Instances are made in every process that needs one, from the config alone.

    A subclass has `scan` and `read`, or `__len__` and `__getitem__`, whose items are {"input_ids", "labels"[, "images"]} or a
    `Sample` of language. Of a class with `__getitem__` there is one more instance for each shard, whose `files` is that shard.
    """

    shard_patterns: ClassVar[tuple[str, ...]] = ("*.jsonl",)
    """Which files of a folder named in the data paths are shards; globs, `**/` for folders below it."""
    version: ClassVar[int] = 1
    """Increase it when the same bytes give other samples, so that earlier scans are not used."""
    is_text: ClassVar[bool] = False
    """Whether `read` gives turns, text or input_ids: then `num_samples` of a scanned record counts the Samples of `read`, and
    loader-prepare makes rows and tokens of them by tokenising (a long text gives several rows)."""
    one_row_each: ClassVar[bool] = False
    """Of text: each Sample is one row (dialogues). Then it is tokenised by loader-prepare only where lengths matter
    (data.packing, data.weigh_by: tokens), or where the model's chat template rewrites history and makes several rows of one."""

    action_key: str = "action"
    """Name of the actions in published statistics (`data.action.statistics_path`)."""
    files: tuple[Path, ...] = ()
    """Of an instance that stands for one shard (see above): that shard, before `__init__` runs. Else empty."""
    remote: RemoteStore | None = None
    """The store of copies of remote files; None if the config names no URL."""

    def __init__(self, config: DataConfig) -> None:
        """config: the `data` section; `config.options` are this dataset's own. Raises ConfigError for options it cannot use."""
        self.config = config
        self.remote = remote_store(config)
        self._indexed = IndexedShards(self)

    def __init_subclass__(cls, **keywords: Any) -> None:
        """A class with `__len__` and `__getitem__` gives rows of language, one each."""
        super().__init_subclass__(**keywords)
        if is_indexed(cls) and cls.scan is BaseSFTDataset.scan:
            cls.is_text, cls.one_row_each = True, True

    def preload(self, shards: Sequence[Path]) -> None:
        """Import the libraries that `read` of these shards imports late.

        Loaders call this before they serve: later there may be no descriptor for an import."""
        return

    def where(self, shard: Path, offset: int) -> tuple[str, str]:
        """(file, record): how error messages name the record at this offset. May read the shard."""
        return str(shard), f"at offset {offset}"

    def action_names(self, shards: Sequence[Path]) -> set[tuple[str, ...]]:
        """What the data calls the dimensions of an action, e.g. `x, ..., yaw, gripper`; different names if data sets differ.

        Empty where the data has no names. They say whether the last dimension is a gripper (`data.action.unmasked`)."""
        return set()

    def findings(self, shards: Sequence[Path]) -> Iterable[str]:
        """What an index beside the shards says that is no error, and that the user should know before training."""
        return ()

    def beside(self, shards: Sequence[Path]) -> str:
        """Fingerprint of what this object has read of files beside the shards (an index, a table), and keeps for its life.

        Workers that start later compare theirs, and read nothing where it differs. Empty: there are no such files."""
        return ""

    def for_split(self, split: str) -> BaseSFTDataset:
        """The dataset for a split ("train", "val"); a different one if the options choose records by split."""
        return self

    def locate(self, path: str) -> EntryShards:
        """An entry of the data paths -> its shards. Raises ConfigError if it has none.

        Override it if an index beside the shards lists them; the index's content then belongs into `EntryShards.identity`."""
        if self.remote is not None and is_url(path):
            from loader_service.remote.listing import locate_remote

            return locate_remote(path, self.shard_patterns, self.remote)
        return locate_entry(path, self.shard_patterns)

    def locate_here(self, path: str) -> EntryShards:
        """As `locate`, but shards that an index lists and that are not on this host are left out: other loaders have them.

        Override it if `locate` looks for each shard of an index. Raises ConfigError if no shard is here."""
        return self.locate(path)

    def local(self, path: Path) -> Path:
        """The same path. Call it right before opening a file that lies beside a shard.

        Fetches a remote file that is not here yet; a local path is returned at once. A shard is always here when `scan` and
        `read` are called. A file that was fetched in such a call stays until the call ends (the last 255 files).
        Raises DataError for a file that is missing or lies outside the data paths, FetchError if it cannot be fetched now."""
        return path if self.remote is None else Path(self.remote.local(str(path)))

    def reading(self) -> AbstractContextManager[None]:
        """Stands around every `scan`, `cut`, `read` and `verify`: files of `local` in this thread stay until the end of the
        block."""
        return nullcontext() if self.remote is None else self.remote.pins.reading()

    def root_of(self, shard: Path) -> str | None:
        """The folder of `data.data_root` if it applies to this shard, else None. A URL applies to remote shards, a folder to
        local ones."""
        root = self.config.data_root
        if root is None or self.remote is None:
            return root
        if is_url(root) != self.remote.holds(shard):
            return None
        return str(self.remote.path_of(root)) if is_url(root) else root

    @property
    def is_counted(self) -> bool:
        """Whether loader-prepare reads every record of it to count rows and tokens: text whose lengths matter."""
        data = self.config
        lengths_matter = data.packing or data.group_by_length or data.weigh_by == "tokens"
        return self.is_text and (not self.one_row_each or lengths_matter)

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        """The shard's records, in their order. Raises DataError naming file, record and field.

        Here: one record for each index of `__len__`."""
        return self._indexed.scan(shard)

    def read(self, shard: Path, offset: int, size: int) -> Iterable[Sample]:
        """The samples of one record, as many as `scan` said. Raises DataError naming file, record and field.

        Here: the one of `__getitem__(offset)`."""
        yield self._indexed.read(shard, offset)

    def cut(self, shard: Path, part_bytes: int) -> list[int]:
        """Byte offsets [0, ..., size] of parts that `scan_part` can scan at the same time; by default the whole shard is one.

        A pure function of the shard's bytes and of `part_bytes`."""
        return [0, shard.stat().st_size]

    def scan_part(self, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        """The records that begin in bytes [start, stop), two neighbours of `cut`. Override both or none."""
        return self.scan(shard)

    def scan_identity(self) -> dict[str, Any]:
        """Every setting that decides what `scan` finds; JSON values. A change of it causes a new scan."""
        data = self.config
        return {
            "dataset_type": data.dataset_type,
            "version": self.version,
            "options": data.options,
            "drop_noops": data.action.drop_noops,
            "on_bad_sample": data.on_bad_sample,
        }

    def read_identity(self) -> dict[str, Any]:
        """Every setting that decides what `read` returns; JSON values. Part of the fingerprint that loaders compare."""
        data = self.config
        identity = {**self.scan_identity(), "chunk": data.action.chunk, "depth": data.image.depth}
        return identity if data.action.learn_padding else {**identity, "learn_padding": False}

    def content(self, shard: Path, offset: int, size: int) -> RecordContent | None:
        """What decides the samples of a record beside `read_identity`, told without decoding them; None: not known.

        Loaders keep encoded records of known content on disk (`loader.disk_cache_gb`). Override it only if nothing else decides
        the samples, and increase `version` with every change of the code. Raises DataError as `read` does."""
        return None

    def verify(self, shard: Path, offset: int, size: int) -> int:
        """Number of samples of one record, after reading all of it with every check there is (`loader-prepare --verify`)."""
        return sum(1 for _ in self.read(shard, offset, size))


def make_datasets(config: DataConfig) -> tuple[BaseSFTDataset, ...]:
    """One dataset for each of the config's sources. Raises ConfigError."""
    return tuple(make_dataset(config.of_source(number)) for number in range(len(config.all_sources())))


def make_dataset(config: DataConfig) -> BaseSFTDataset:
    """The dataset that `data.dataset_type` names. Raises ConfigError."""
    target = SOURCES.get(config.dataset_type, config.dataset_type)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        raise ConfigError(
            f"data.dataset_type is {config.dataset_type!r}: choose one of {', '.join(SOURCES)}, or name your own class as "
            "package.module:Class"
        )
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        way_out = ""
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            way_out = (
                "; for a module in the working folder put PYTHONPATH=. in front of the command, or install its package "
                "(pip install -e . in the folder of its pyproject.toml)"
            )
        raise ConfigError(
            f"data.dataset_type is {config.dataset_type!r}: it cannot be imported ({reason}){way_out}"
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, BaseSFTDataset)):
        raise ConfigError(f"data.dataset_type is {config.dataset_type!r}: not a subclass of BaseSFTDataset")
    if not is_indexed(cls) and BaseSFTDataset in (_owner(cls, "scan"), _owner(cls, "read")):
        raise ConfigError(
            f"data.dataset_type is {config.dataset_type!r}: the class needs scan and read, or __len__ and __getitem__"
        )
    return cls(config)


def _owner(cls: type, name: str) -> type | None:
    """The class that a method comes from."""
    return next((base for base in cls.__mro__ if name in vars(base)), None)
