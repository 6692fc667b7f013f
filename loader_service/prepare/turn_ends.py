"""Whether the model will know where to stop: the last learned token of each turn has to be one at which the export stops."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from loader_service.pieces.text_samples import TextSample
from stoker_proto.config import DataConfig
from stoker_proto.model_folder import ModelFolder
from stoker_proto.processor import EncodedRow, Processor
from stoker_proto.text.turn_ends import last_learned

logger = logging.getLogger(__name__)


class EndCheck:
    """Looks at rows of an entry, and warns once."""

    def __init__(self, processor: Processor, model: ModelFolder, data: DataConfig) -> None:
        self._processor, self._data = processor, data
        self._own = model.stop_ids()
        self._stops = {*self._own, *processor.turn_ends.ids}
        """The export adds the latter to the model's own."""
        self._found: tuple[int, bool] | None = None

    def look(self, sample: TextSample, rows: Sequence[EncodedRow]) -> None:
        """The rows of a sample. Plain text has no turns, and in a dialogue that is learned whole nothing shows where they end."""
        if sample.labels is None and (
            not sample.turns or any(turn.learned and turn.role != "assistant" for turn in sample.turns)
        ):
            return
        for row in rows:
            is_cut = self._data.overlong == "truncate" and len(row.input_ids) == self._data.max_seq_len
            ends = last_learned(row.supervised)
            for at in ends[:-1] if is_cut else ends:
                end = int(row.input_ids[at])
                if end not in self._stops and self._found is None:
                    self._found = end, bool(sample.turns)

    def tell(self, path: str) -> None:
        """Warn of what was found in the entry, and forget it."""
        if self._found is None:
            return
        end, is_dialogue = self._found
        self._found = None
        [text] = self._processor.token_texts(np.array([end]))
        stops = ", ".join(map(repr, self._processor.token_texts(np.array(sorted(self._stops), np.int64)))) or "none"
        if is_dialogue:
            logger.warning(
                "%s: the last learned token of a turn is %r (%d), so the model does not learn to stop: the chat template has no "
                "token that ends the assistant's turn. Add one to chat_template.jinja behind what the assistant says, or set "
                "data.dialogue.template to stoker. The model stops at %s",
                path, text, end, stops,
            )  # fmt: skip
        else:
            logger.warning(
                "%s: the last token with a label is %r (%d), and the model stops at %s: it does not learn to stop. Put one of "
                "these behind each answer, with its label, or add %d to eos_token_id in the model's generation_config.json",
                path, text, end, stops, end,
            )  # fmt: skip
