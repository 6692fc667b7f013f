"""What a dataset returns: the records that a scan found, and the samples of a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.named_files import NamedFiles
from stoker_proto.text.turns import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedRecord:
    """What `scan` found: one record of a shard."""

    offset: int
    """Place of the record for `read`: a byte offset, a row number, or what the dataset defines; 0 <= offset < 2**63."""
    size: int
    """Bytes or rows from there; 0 <= size < 2**32."""
    num_samples: int
    """Samples that `read` will return; 0 is allowed. For text (`is_text`) loader-prepare replaces it by the number of rows."""
    num_tokens: int = 0
    """Tokens of all its rows, if loader-prepare counts them; else 0."""
    row_tokens: tuple[int, ...] = ()
    """Tokens of each of its rows, if loader-prepare counts dialogues that a chat template divides; else empty."""
    actions: NDArray[np.float32] | None = None
    """float32[T, D], the actions that the statistics and the codec are fitted on, in the order of time (`fast` is fitted on
    chunks of them, see `chunk_offsets`), or None."""
    chunk_offsets: NDArray[np.int64] | None = None
    """int64[K]: offsets from a sample's timestep to those of its chunk, clamped to the record's ends; None: 0 to K - 1."""
    states: NDArray[np.float32] | None = None
    """float32[T, S], the states that `data.state: text` is scaled by, or None."""
    error: str | None = None
    """Policy `skip` (data.on_bad_sample): why `read` will fail, as the scan found. The record keeps its place."""
    notes: tuple[str, ...] = ()
    """What was repaired or left out, in texts that many records share: loader-prepare counts each text."""
    files: NamedFiles | None = None
    """The files that the record only names; part of the fingerprint that loaders compare. None: not known."""


@dataclass(frozen=True, slots=True)
class RecordContent:
    """What a record is made of, as far as it can be told without decoding it."""

    row: bytes | None
    """The bytes of the shard that decide the samples; None: the content of the whole entry, and the record's place in it."""
    files: NamedFiles | None
    """The files that the record names, as they are now; None: it names none."""


@dataclass(slots=True, kw_only=True)
class Sample:
    """One row of training, in one of four forms (not frozen: one is made for each timestep, and that would take 7 times as long):

    `instruction` with `action` (an action chunk is learned) or with `answer` (words are learned);
    `turns`: a dialogue, whose learned turns are labels;
    `text`: plain language modelling, every token is a label;
    `input_ids`: the same, tokenised already; with `labels`, and then also with images, what these say is learned.
    """

    instruction: str = ""
    turns: tuple[Turn, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    """Definitions of the functions that a dialogue offers, as JSON objects. The model's chat template writes them if it has a
    form for functions; else they are written into the system turn."""
    text: str | None = None
    special_tokens: tuple[str, ...] = ()
    """Special tokens that the dataset wrote into `text` (fill-in-the-middle, repository names). Anything else in it that looks
    like a special token is tokenised as plain text."""
    input_ids: NDArray[np.int32] | None = None
    """int32[T]."""
    labels: NDArray[np.int32] | None = None
    """int32[T], beside `input_ids`: -100 where nothing is learned, else the token itself. Then the ids are one row, unchanged;
    without labels every token is learned, and long ids become several rows."""
    state: NDArray[np.float32] | None = None
    """float32[S], the robot's state (joints, gripper), in the source's units."""
    images: tuple[NDArray[np.uint8], ...] = ()
    """uint8[H, W, 3] each; a depth frame is uint16[H, W] in mm."""
    action: NDArray[np.float32] | None = None
    """float32[K, D], K = data.action.chunk, in action units."""
    action_is_pad: NDArray[np.bool_] | None = None
    """bool[K], or None if the source does not say: which actions lie beyond the record's ends and repeat its last (or first) one.
    With `data.action.learn_padding: false` they are no labels of training."""
    auxiliary: NDArray[np.float32] | None = None
    """float32[A], beside an action: what training predicts too, such as the true positions of objects. No input of the model."""
    answer: str | None = None
    """Text to be learned, where there is no action."""
    timestep: int = 0
    """Position inside the record; part of the sample's key."""
    notes: tuple[str, ...] = ()
    """What `read` repaired in the record (see `ScannedRecord.notes`)."""
    files: NamedFiles | None = None
    """The files that were opened for this record. The loader compares those of the first sample with what the scan found."""
