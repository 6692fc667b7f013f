"""What is kept of the records that were read: numbers and texts, no frames.

Letters: T timesteps, D dimensions of an action, S numbers of a state, K actions in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from loader_service.doctor.finding import Finding
from loader_service.manifest import EntryManifest
from loader_service.sources.base import BaseSFTDataset, Turn
from stoker_proto.actions import ActionCodec
from stoker_proto.config import Config
from stoker_proto.processor import Processor


@dataclass(slots=True)
class CameraFacts:
    """The frames of one image of the samples of a record."""

    sizes: set[tuple[int, int]] = field(default_factory=set)
    """(height, width) in pixels."""
    num_frames: int = 0
    num_constant: int = 0
    """Frames of one colour (black ones too)."""
    num_black: int = 0
    num_repeated: int = 0
    """Frames equal to the one before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFacts:
    """A row that was written of a sample of the record."""

    num_tokens: int
    num_labels: int
    last_label: int | None
    """Id of the last token that is a label."""
    is_answer: bool
    """Whether the model generates it: a dialogue, an answer or an action; plain text is not."""


@dataclass(slots=True, kw_only=True)
class RecordFacts:
    """What is kept of one record."""

    file: str
    record: int
    offset: int
    size: int
    is_whole: bool = True
    """False: reading stopped at the limit of time."""
    content: str = ""
    """Hash of all that was read of a whole record: actions, states, texts and frames."""
    actions: NDArray[np.float32] | None = None  # [T, D], the first of each chunk
    states: NDArray[np.float32] | None = None  # [T, S]
    instructions: set[str] = field(default_factory=set)
    turns: tuple[Turn, ...] = ()
    """Of the last sample; a record of `chat` has one."""
    texts: list[str] = field(default_factory=list)
    """Everything that is tokenised as text."""
    cameras: list[CameraFacts] = field(default_factory=list)
    rows: list[RowFacts] = field(default_factory=list)
    round_trip: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=list)
    """Chunks float32[K, D]: the action, and what `actions_from_ids` makes of its tokens."""


@dataclass(slots=True, kw_only=True)
class EntryFacts:
    """One entry of the data paths."""

    split: str
    entry: int
    key: str
    """Its place in the config: `data.train_data_paths[0]`."""
    path: str
    source: int
    dataset: BaseSFTDataset
    manifest: EntryManifest | None
    """None where the scan failed."""
    records: list[RecordFacts] = field(default_factory=list)

    def actions(self) -> NDArray[np.float32] | None:
        """float32[T, D] of all records that were read, as far as they are of one width."""
        return _joined([record.actions for record in self.records])

    def states(self) -> NDArray[np.float32] | None:
        """float32[T, S], likewise."""
        return _joined([record.states for record in self.records])


@dataclass(slots=True, kw_only=True)
class Examined:
    """All that the checks look at."""

    config: Config
    entries: list[EntryFacts] = field(default_factory=list)
    codec: ActionCodec | None = None
    processor: Processor | None = None
    special_tokens: tuple[str, ...] = ()
    """Of the tokenizer, in text."""
    stop_ids: frozenset[int] = frozenset()
    """Tokens at which generation stops."""
    round_trip_share: float = 0.05
    """Mean error of the codec that is still good, as a share of the dimension's range."""
    findings: list[Finding] = field(default_factory=list)
    """Of the stages before the checks."""

    def records(self) -> Iterator[tuple[EntryFacts, RecordFacts]]:
        """All records that were read, with their entries."""
        return ((entry, record) for entry in self.entries for record in entry.records)

    def read(self) -> dict[str, int]:
        """What was read -> how many."""
        records = [record for _, record in self.records()]
        return {
            "entries": len(self.entries),
            "records": len(records),
            "frames": sum(camera.num_frames for record in records for camera in record.cameras),
            "rows": sum(len(record.rows) for record in records),
        }


def _joined(arrays: list[NDArray[np.float32] | None]) -> NDArray[np.float32] | None:
    found = [array for array in arrays if array is not None and len(array)]
    if not found:
        return None
    return np.concatenate([array for array in found if array.shape[1] == found[0].shape[1]])
