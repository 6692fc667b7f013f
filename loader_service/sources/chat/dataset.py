"""`chat`: dialogues in the usual formats (`formats`), one record and one sample each.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}

`learn` selects the labels; a message's own flag (`weight`, `train`, `mask` ..., see `turn_fields`) overrides it. Broken
dialogues are repaired by the rules of `repair`. `<image>` in the words of the user or of a tool is where an image belongs: the
one that its part names, or else the next of the row's. A row with images and no such mark has them at the beginning of the
user's first turn, one per line. In a row without images the mark is plain text; such rows are counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.base import Sample, Turn
from loader_service.sources.chat.formats import COLUMNS, FIELDS, FORMATS, NOT_SEEN, Conversation, Names, format_of
from loader_service.sources.chat.frames import load_frame
from loader_service.sources.chat.frames import preload as preload_images
from loader_service.sources.chat.message import ROLES, Message
from loader_service.sources.chat.repair import mend
from loader_service.sources.chat.turn_fields import HIDDEN, LEARNED, weight_of
from loader_service.sources.fields import PREFERENCES, REASONED, refuse_preferences, unread
from loader_service.sources.options import read_options
from loader_service.sources.tables.dataset import TableDataset
from loader_service.sources.tables.table import Table
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.text.turns import IMAGE, IMAGE_ROLES

_FIRST_ROWS = 16
"""Looked at to find the format of a shard."""
_MAX_IMAGES = 255  # of a sample, as they travel
_ROW_FLAGS = ("weight", "loss_weight", "trainable")
_ROW_FLAG_NAMES = frozenset(_ROW_FLAGS)
_USUAL = ("id", "_id", "idx", "index", "uuid", "hash", "prompt_id", "conversation_id")
LITERAL = f"{IMAGE} in a row without images was taken for text"
INLINED = "reasoning beside the content: written into it as <think> (data.options.reasoning)"
DROPPED = "reasoning beside the content: left out (data.options.reasoning)"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """`data.options` of this dataset."""

    format: Literal["auto", "alpaca", "sharegpt", "messages", "ultrachat", "prompt_completion"] = "auto"
    """`auto`: found by each row's fields; all rows of a file must have the same."""
    learn: Literal["assistant", "last", "all"] = "assistant"
    """Whose words are labels: all turns of the assistant, its last one only, or every turn (also the prompt)."""
    system: str | None = None
    """In the place of every row's own system text; "" leaves it out. Function definitions are kept."""
    columns: dict[str, str] = field(default_factory=dict)
    """The format's name of a field -> its name in the files, e.g. {messages: chat}."""
    turn_fields: dict[str, str] = field(default_factory=dict)
    """The same inside of turns, e.g. {from: speaker, value: text}."""
    roles: dict[str, str] = field(default_factory=dict)
    """Name of a role in the files -> a known one, e.g. {bot: assistant}."""
    reasoning: Literal["template", "inline", "drop"] = "template"
    """What happens to reasoning that stands beside the content of the assistant's turns. `template`: the model's chat template
    gets it, and if that has no place for it, the same as `inline`; `inline`: it is written before the content between <think>
    and </think>; `drop`: it is left out."""
    validate: bool = False
    """Parse and mend every row in loader-prepare, not only when it is read."""
    unpack_parquet: bool = False
    """Keep the needed columns of parquet files unpacked in the cache folder: quick random reads for room on the disk."""


class ChatDataset(TableDataset):
    """Dialogues of tables."""

    one_row_each: ClassVar[bool] = True
    version: ClassVar[int] = (
        TableDataset.version + 3
    )  # arguments of calls by their other names; calls in `conversations`
    usual: ClassVar[Collection[str]] = _USUAL

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        self.options = read_options(ChatOptions, config.options, "chat")
        unknown = [name for name in self.options.columns if name not in COLUMNS]
        if unknown:
            raise ConfigError(
                f"data.options.columns: {', '.join(unknown)} are no fields of a format: {', '.join(COLUMNS)}"
            )
        unknown = [role for role in self.options.roles.values() if role not in ROLES]
        if unknown:
            raise ConfigError(f"data.options.roles: {', '.join(unknown)} are no known roles: {', '.join(ROLES)}")
        columns = self.options.columns
        self._known = {
            name: frozenset((*(columns.get(field, field) for field in fields), *_USUAL, *_ROW_FLAGS))
            for name, fields in FIELDS.items()
        }
        """Format -> fields of its rows that are read, or need not be named where they are not."""
        self._names = Names(self.options.roles, self.options.turn_fields)
        self.validate, self.unpack_parquet = self.options.validate, self.options.unpack_parquet

    def preload(self, shards: Sequence[Path]) -> None:
        """Adds the formats of images."""
        super().preload(shards)
        preload_images()

    def columns(self) -> tuple[str, ...]:
        """Those of all formats, by their names in the files, and what rows are refused for."""
        named = [self.options.columns.get(name, name) for name in COLUMNS]
        return tuple(dict.fromkeys((*named, *PREFERENCES, *_ROW_FLAGS, *NOT_SEEN)))

    def kind_of(self, table: Table, shard: Path, stop: int) -> str:
        """The format of the first rows, which all rows must have; bad rows among them are left to the scan."""
        found: dict[str, int] = {}
        reason: DataError | None = None
        for offset, _, row in itertools.islice(table.rows(0, stop), _FIRST_ROWS):
            try:
                if isinstance(row, dict):
                    found.setdefault(self._format(row), offset)
            except DataError as error:
                reason = reason or self._located(error, table, shard, offset)
        if len(found) > 1:
            (first, _), (other, offset) = list(found.items())[:2]
            raise self._located(_mixed(other, first), table, shard, offset)
        if not found and reason is not None:
            raise reason
        return next(iter(found), "")

    def sample(self, row: dict[str, Any], shard: Path, kind: str) -> Sample:
        """The dialogue, mended, with its frames."""
        conversation, unread_notes = self._parse(row, kind)
        _set_system(conversation, self.options.system)
        literal = _give_images(conversation)
        messages, notes = mend(conversation.messages)
        images = [image for message in messages for image in message.images]
        frames = self._frames(images, shard) if images else ()
        all_notes = (*notes, *self._place_reasoning(messages), *((LITERAL,) if literal else ()), *unread_notes)
        return Sample(turns=self._turns(messages), tools=conversation.tools, images=frames, notes=all_notes)

    def unread(self, row: dict[str, Any], kind: str) -> tuple[str, ...]:
        """Fields of the row, of turns and of parts; and whether a template has to write reasoning."""
        conversation, notes = self._parse(row, kind)
        for_template = self.options.reasoning == "template" and any(m.reasoning for m in conversation.messages)
        return (REASONED, *notes) if for_template else notes

    def _parse(self, row: dict[str, Any], kind: str) -> tuple[Conversation, tuple[str, ...]]:
        """What the row says, and notes on the fields that are not read."""
        name = self._format(row)
        if kind not in (name, ""):
            raise _mixed(name, kind)
        if not _ROW_FLAG_NAMES.isdisjoint(row) and weight_of({flag: row.get(flag) for flag in _ROW_FLAGS}, "") is False:
            raise DataError("the row says that it is not to be learned (weight 0): remove it")
        conversation = FORMATS[name][1](self._renamed(row), self._names)
        return conversation, (*unread(row, self._known[name]), *conversation.notes)

    def _place_reasoning(self, messages: list[Message]) -> tuple[str, ...]:
        """Reasoning goes where the options say; a note on it."""
        thinking = [message for message in messages if message.reasoning]
        if not thinking:
            return ()
        if self.options.reasoning == "template":
            return (REASONED,)
        for message in thinking:
            if self.options.reasoning == "inline":
                message.text = f"<think>\n{(message.reasoning or '').strip()}\n</think>\n\n{message.text}"
            message.reasoning = None
        return (INLINED if self.options.reasoning == "inline" else DROPPED,)

    def _frames(self, images: list[Any], shard: Path) -> tuple[NDArray[np.uint8], ...]:
        root = self.root_of(shard)
        base = Path(root) if root else shard.parent
        return tuple(
            load_frame(image, base=base, root=root, field=f"images[{i}]", local=self.local)
            for i, image in enumerate(images)
        )

    def _turns(self, messages: list[Message]) -> tuple[Turn, ...]:
        learn, last = self.options.learn, len(messages) - 1  # mended: the last turn is the assistant's
        turns = tuple(
            Turn(
                role=message.role,
                text=message.text,
                calls=message.calls,
                call_id=message.call_id,
                learned=message.learned
                if message.learned is not None
                else learn == "all"
                or (message.role == "assistant" and not message.in_prompt and (learn == "assistant" or i == last)),
                reasoning=message.reasoning,
            )
            for i, message in enumerate(messages)
        )
        if not any(turn.learned for turn in turns):
            raise DataError(
                f"no turn is learned: the flags ({', '.join((*LEARNED, *HIDDEN))}) of its messages turn all of them off"
            )
        return turns

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        names = self.options.columns
        if not names:
            return row
        return {**row, **{name: row.get(in_file) for name, in_file in names.items()}}

    def _format(self, row: dict[str, Any]) -> str:
        """Of a row as it is in the file. Raises DataError, also for preferences."""
        meant = ("chosen", "rejected") if self.options.format != "auto" else ()
        refuse_preferences(row, (*self.options.columns.values(), *meant))
        named = self._renamed(row)
        if self.options.format == "auto":
            return format_of(named, row)
        column = FORMATS[self.options.format][0]
        if named.get(column) is None:
            in_file = self.options.columns.get(column, column)
            fields = ", ".join(map(str, row)) or "none"
            reason = f"it is not there, and data.options.format is {self.options.format}; there are {fields}"
            if in_file != column:
                reason = f"data.options.columns calls it {in_file}, which is not there; there are {fields}"
            raise DataError(reason, field=column)
        return self.options.format


def _mixed(found: str, first: str) -> DataError:
    return DataError(
        f"a row of format {found} in a file that begins with format {first}: keep each format in files of its own, or name "
        "one in data.options.format"
    )


def _set_system(conversation: Conversation, system: str | None) -> None:
    """Replace the row's system text by the config's, if it has one."""
    if system is None:
        return
    messages = conversation.messages
    own = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))  # turns in front
    first = replace(messages[0], text=system) if own else Message("system", system)
    messages[:own] = [first] if system.strip() else []


def _give_images(conversation: Conversation) -> bool:
    """Give each message the images that are marked in it. Returns whether a row without images has marks."""
    rows, messages = conversation.images, conversation.messages
    showing = [message for message in messages if message.role in IMAGE_ROLES]
    if not rows and not any(image is not None for message in showing for image in message.images):
        for message in showing:
            message.images = ()
        return any(IMAGE in message.text for message in showing)
    for message in showing:
        message.images = message.images or (None,) * message.text.count(IMAGE)
    marks = sum(message.images.count(None) for message in showing)
    own = sum(len(message.images) for message in showing) - marks
    if len(rows) + own > _MAX_IMAGES:
        raise DataError(f"{len(rows) + own} images: at most {_MAX_IMAGES} are taken", field="images")
    elsewhere = sum(message.text.count(IMAGE) for message in messages if message.role not in IMAGE_ROLES)
    first = next((message for message in messages if message.role == "user"), None)
    if marks == own == elsewhere == 0 and first is not None:
        first.text = f"{IMAGE}\n" * len(rows) + first.text
        first.images, marks = (None,) * len(rows), len(rows)
    if marks != len(rows):
        raise DataError(
            f"{len(rows)} images and {marks} marks {IMAGE} in the texts of user and tools ({elsewhere} in others, which show "
            f"none; {own} more images are named by their own parts): as many are expected",
            field="images",
        )
    remaining = iter(rows)
    for message in showing:
        message.images = tuple(next(remaining) if image is None else image for image in message.images)
    return False
