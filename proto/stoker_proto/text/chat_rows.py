"""Dialogues of several turns as rows: the text of learned turns, and the token that ends each, are labels.

    stoker          You are a robot. <|User|> Hi <|Assistant|> Hello</s><|User|> Bye <|Assistant|> Bye</s>
    learned                                                    ^^^^^^^^^^                          ^^^^^^^^
    chat_template   the text of the model's own template, tokenised as a whole; see `chat_spans`

With `stoker` the text of a system turn comes before the next turn, and a tool's turn is written as the user's. The prompt before
each answer is tokenised separately, as in generation, so one question with one answer has the same ids as `instruction` and
`answer`. The other templates can only write that: one user turn and one assistant turn. Where all turns are learned, every token
is a label except the leading tokens and images.

A dialogue is one row, except where a chat template rewrites history: see `chat_history`. Functions and reasoning are written by
the chat template where it has a form for them, else as text: see `functions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stoker_proto.errors import DataError, RowError
from stoker_proto.text.chat_history import ChatHistory
from stoker_proto.text.chat_spans import DialogueRenderer
from stoker_proto.text.control_tokens import unmarked, without_marks
from stoker_proto.text.dialogue import ASSISTANT, USER
from stoker_proto.text.functions import Tools, write_functions, write_reasoning
from stoker_proto.text.rendered import Labelled, Rendered, TextJob, run_together
from stoker_proto.text.rows import EncodedRow, RowForm, RowWriter
from stoker_proto.text.tokenizer import int32_array
from stoker_proto.text.turns import Parts, Turn, check_turns, is_learned_whole, is_plain, mark_parts, place_images

_NOT_LEARNED, _LEARNED = np.zeros(1, np.uint8), np.ones(1, np.uint8)


@dataclass(frozen=True, slots=True)
class DialogueSample:
    """A dialogue as its source gives it."""

    turns: Sequence[Turn]
    num_images: int = 0
    tools: Tools = ()


class DialogueRows:
    """Writes rows of dialogues."""

    def __init__(self, form: RowForm, rows: RowWriter) -> None:
        """rows: of the same form; it writes images, and dialogues of one question and answer where a template has no turns."""
        self._tokenizer, self._control, self._dialogue = form.tokenizer, form.control, form.dialogue
        self._image, self._max_seq_len, self._overlong = form.image, form.max_seq_len, form.overlong
        self._rows = rows
        self._leading, self._end = int32_array(form.tokenizer.leading), int32_array([form.end_id])
        self._history: ChatHistory | None = None
        if form.dialogue.template == "chat_template":
            self._renderer = DialogueRenderer(form.dialogue.chat, form.control, rows.with_image_frames)
            self._history = ChatHistory(form.dialogue.chat, self._renderer)

    @property
    def may_divide(self) -> bool:
        """Whether a dialogue may need several rows."""
        return self._history is not None and self._history.is_rewritten

    def encode(self, dialogues: Sequence[DialogueSample]) -> list[list[EncodedRow] | DataError]:
        """The rows of each dialogue, or a DataError; a RowError where the config cannot write the dialogue."""
        return run_together(self._tokenizer, self._control, [self._encode(dialogue) for dialogue in dialogues])

    def _encode(self, dialogue: DialogueSample) -> TextJob[list[EncodedRow]]:
        check_turns(dialogue.turns)
        if dialogue.num_images and self._image is None:
            raise RowError(
                f"a sample has {dialogue.num_images} images, but the model takes text only; use a vision-language model or drop "
                "them"
            )
        turns, tools = self._written_out(dialogue)
        parts = place_images(turns, dialogue.num_images)
        if not self._dialogue.takes_turns or (self._image is not None and self._image.before_bos):
            return [self._encode_single(turns, parts, dialogue.num_images)]
        if self._history is None or not self.may_divide or is_learned_whole(turns):
            return [(yield from self._encode_row(turns, parts, tools, dialogue.num_images))]
        rows = []
        for kept in self._history.divide(turns, parts, tools):
            of_kept = parts[: len(kept)]
            num_images = sum(of_turn.count(None) for of_turn in of_kept)
            row = yield from self._encode_row(kept, of_kept, tools, num_images)
            rows.append(replace(row, num_images=num_images))
        return rows

    def _written_out(self, dialogue: DialogueSample) -> tuple[Sequence[Turn], Tools]:
        """Functions and reasoning become text where the template has no form for them."""
        turns, tools = dialogue.turns, dialogue.tools
        if not tools and is_plain(turns):
            return turns, ()
        chat = self._dialogue.chat if self._history is not None else None
        if any(turn.reasoning for turn in turns) and (chat is None or not chat.takes_reasoning):
            turns = write_reasoning(turns)
        if (tools or any(turn.calls for turn in turns)) and (chat is None or chat.call_form is None):
            turns, tools = write_functions(turns, tools), ()
        return turns, tools

    def _encode_row(
        self, turns: Sequence[Turn], parts: Sequence[Parts], tools: Tools, num_images: int
    ) -> TextJob[EncodedRow]:
        row = yield from self._write(turns, parts, tools, num_images)
        if len(row.input_ids) <= self._max_seq_len:
            return row
        if self._overlong == "truncate":
            return self._truncated(row)
        if self._overlong == "drop_turns":
            return (yield from self._with_fewer_turns(turns, parts, tools, num_images, len(row.input_ids)))
        raise RowError(
            f"the dialogue of {len(turns)} turns needs {len(row.input_ids)} tokens (with {num_images} images), but "
            f"data.max_seq_len is {self._max_seq_len}: raise it, or set data.overlong to truncate or drop_turns"
        )

    def _encode_single(self, turns: Sequence[Turn], parts: Sequence[Parts], num_images: int) -> EncodedRow:
        if is_learned_whole(turns):
            raise RowError(
                f"data.dialogue.template {self._dialogue.template} (with this model) learns answers only: use stoker or "
                "chat_template to learn whole dialogues"
            )
        user, *rest = turns
        in_front = parts[0][:num_images] == (None,) * num_images and parts[0][num_images:].count(None) == 0
        if user.role != "user" or len(rest) != 1 or rest[0].role != "assistant" or not in_front:
            raise RowError(
                f"data.dialogue.template {self._dialogue.template} (with this model) writes one turn of the user's, its images "
                f"in front, and one of the assistant's, not {', '.join(turn.role for turn in turns[:8])}: use stoker or "
                "chat_template"
            )
        instruction = "".join(part for part in parts[0] if part is not None)
        return self._rows.encode(instruction, num_images, answer=rest[0].text)

    def _write(
        self, turns: Sequence[Turn], parts: Sequence[Parts], tools: Tools, num_images: int
    ) -> TextJob[EncodedRow]:
        whole = is_learned_whole(turns)
        spanned = turns
        if whole:  # every token is a label: no turn needs its own spans
            spanned = [replace(turn, learned=False) for turn in turns]
        if self._dialogue.template == "chat_template":
            rendered = self._renderer(spanned, parts, tools)
            self._check_reasoning(turns, rendered, whole=whole)
            [(ids, supervised)] = yield [rendered]
        else:
            ids, supervised = yield from self._by_turns(spanned, parts)
        if whole:
            supervised = np.ones(len(ids), np.uint8)
            supervised[: 0 if self._dialogue.writes_bos else len(self._tokenizer.leading)] = 0
            if self._image is not None:
                supervised[ids == self._image.token_id] = 0
        return self._rows.expand(ids, supervised, num_images)

    def _check_reasoning(self, turns: Sequence[Turn], rendered: Rendered, *, whole: bool) -> None:
        """Check that the learned text has the reasoning of the learned turns. Raises RowError. whole: all of it is learned."""
        if not any(turn.reasoning for turn in turns):
            return
        # A template with {% generation %} blocks says itself how much of a turn is learned.
        is_whole = whole or self._dialogue.chat.marks_generation
        text = rendered.text if is_whole else "".join(rendered.text[a:b] for a, b in rendered.spans)
        position, squeezed = 0, "".join(unmarked(text).split())
        for number, turn in enumerate(turns):
            if not turn.learned or not turn.reasoning:
                continue
            wanted = "".join(without_marks(turn.reasoning).split())
            found = squeezed.find(wanted, position)
            if found < 0:
                raise _reasoning_lost(number)
            position = found + len(wanted)

    def _by_turns(self, turns: Sequence[Turn], parts: Sequence[Parts]) -> TextJob[Labelled]:
        pieces: list[Rendered] = []
        ends: list[tuple[int, bool]] = []  # (number of pieces before an end token, whether it is learned)
        prompt = ""
        for turn, of_turn in zip(turns, parts, strict=True):
            text = " ".join(
                self._rows.image_frame if part is None else part for part in mark_parts(turn, of_turn, self._control)
            )
            if turn.role == "system":
                prompt += f"{text} "
            elif turn.role == "assistant":
                text = f"{self._dialogue.answer_opening}{text}"
                pieces += [Rendered(prompt + ASSISTANT), Rendered(text, ((0, len(text)),) if turn.learned else ())]
                ends.append((len(pieces), turn.learned))
                prompt = ""
            else:
                prompt += f"{USER} {text} "
        if prompt:
            pieces.append(Rendered(prompt.rstrip()))
        encoded = yield pieces
        ids, labels = [self._leading], [np.zeros(len(self._leading), np.uint8)]
        begin = 0
        for stop, learned in (*ends, (len(pieces), None)):
            for found, supervised in encoded[begin:stop]:
                ids.append(found)
                labels.append(supervised)
            if learned is not None:
                ids.append(self._end)
                labels.append(_LEARNED if learned else _NOT_LEARNED)
            begin = stop
        return np.concatenate(ids), np.concatenate(labels)

    def _truncated(self, row: EncodedRow) -> EncodedRow:
        kept, cut = np.split(row.input_ids, [self._max_seq_len])
        if self._image is not None and (cut == self._image.token_id).any():
            raise RowError(
                f"data.overlong is truncate, and an image stands behind token {self._max_seq_len} of {len(row.input_ids)}: "
                "images are never cut; raise data.max_seq_len"
            )
        supervised = row.supervised[: self._max_seq_len]
        if not supervised.any():
            raise DataError(
                f"no label is left of {len(row.input_ids)} tokens cut at data.max_seq_len {self._max_seq_len}: raise it, or "
                "set data.overlong to drop_turns"
            )
        return EncodedRow(kept, supervised)

    def _with_fewer_turns(
        self, turns: Sequence[Turn], parts: Sequence[Parts], tools: Tools, num_images: int, needed: int
    ) -> TextJob[EncodedRow]:
        """The row after dropping as few of the oldest exchanges as possible. System turns stay, and so do images."""
        system = [i for i, turn in enumerate(turns) if turn.role == "system"]
        exchanges = [i for i, turn in enumerate(turns) if turn.role == "user"][1:]
        starts = [first for first in exchanges if sum(of_turn.count(None) for of_turn in parts[first:]) == num_images]

        def without(first: int) -> TextJob[EncodedRow | None]:
            kept = [i for i in system if i < first] + list(range(first, len(turns)))
            if not any(turns[i].learned for i in kept):
                return None
            return (yield from self._write([turns[i] for i in kept], [parts[i] for i in kept], tools, num_images))

        low, high, best = 0, len(starts) - 1, None
        while low <= high:  # fewer turns never need more tokens, so bisection finds the first that fits
            middle = (low + high) // 2
            row = yield from without(starts[middle])
            if row is None or len(row.input_ids) <= self._max_seq_len:
                best, high = row or best, middle - 1
            else:
                low = middle + 1
        if best is None and len(starts) < len(exchanges):
            raise RowError(
                f"data.overlong is drop_turns, the dialogue needs {needed} tokens, data.max_seq_len is {self._max_seq_len}, and "
                "a turn to be dropped has an image: images are never cut; raise data.max_seq_len"
            )
        if best is None:
            raise DataError(
                f"the dialogue needs {needed} tokens, data.max_seq_len is {self._max_seq_len}, and its last learned exchange "
                "alone does not fit: raise it, or set data.overlong to truncate"
            )
        return best


def _reasoning_lost(number: int) -> RowError:
    return RowError(
        f"turn {number} has reasoning beside its text, and the model's chat template does not write it there, so that it would "
        "not be learned: set data.options.reasoning to inline (it is written into the text as <think>) or to drop, or learn only "
        "the assistant's turns (data.options.learn: assistant)"
    )
