"""Prompt and answer as token ids: the row for training, and the prompt that generation starts from.

Dialogues of several turns are in `chat_rows`, plain text in `text_rows`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stoker_proto.actions.vocabulary import ActionVocabulary
from stoker_proto.errors import DataError, RowError
from stoker_proto.images.spec import ImageSpec
from stoker_proto.text.control_tokens import OPEN, ControlTokens
from stoker_proto.text.dialogue import Dialogue
from stoker_proto.text.state_text import StateText
from stoker_proto.text.tokenizer import Ids, TextTokenizer, int32_array

_MAX_PROMPTS = 8192  # most cached prompts: instructions repeat, and a look-up takes a thousandth of tokenising


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRow:
    """One row for training."""

    input_ids: Ids  # [T]
    supervised: NDArray[np.uint8]  # [T]: 1 where the token is a label
    num_images: int | None = None
    """How many of the sample's images the row shows, from the first on; None: all."""


class ActionRows(NamedTuple):
    """The rows of N samples of one instruction, read-only."""

    input_ids: Ids  # [N, T]
    supervised: NDArray[np.uint8]  # [T], the same for all


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowForm:
    """What all rows of a model have in common, whatever kind of data they come from."""

    tokenizer: TextTokenizer
    control: ControlTokens
    dialogue: Dialogue
    image: ImageSpec | None
    """None: the model takes text only."""
    end_id: int
    """Of the token behind an answer."""
    max_seq_len: int
    """Most tokens of a row (`data.max_seq_len`)."""
    overlong: str
    """What happens to a longer dialogue (`data.overlong`)."""


class RowWriter:
    """Writes rows of an instruction and its answer."""

    def __init__(
        self, form: RowForm, vocabulary: ActionVocabulary | None, *, state: StateText | None, needs_state: bool
    ) -> None:
        """needs_state: whether instructions include the robot's state. state: None until its statistics are known."""
        self._tokenizer, self._control, self._dialogue = form.tokenizer, form.control, form.dialogue
        self._image, self._max_seq_len = form.image, form.max_seq_len
        self._state, self._needs_state = state, needs_state
        self._end = np.array([form.end_id], np.int32)
        # A table, because computing the ids row by row takes longer.
        self._id_of_code: Ids | None = None
        if vocabulary is not None:
            self._id_of_code = vocabulary.to_ids(np.arange(vocabulary.num_codes))
        self._prompts: dict[tuple[str, int], Ids] = {}

    def prompt(self, instruction: str, num_images: int, state: NDArray[np.float32] | None = None) -> Ids:
        """int32[T]: the prompt that generation starts from, which is the beginning of `encode`'s row. Raises DataError.

        state: float32[S], required with `data.state: text` and ignored without. The array may be shared and read-only.
        """
        if self._needs_state:  # differs at each timestep: nothing to cache
            return self._write_prompt(instruction, num_images, self._state_text(state))
        key = (instruction, num_images)
        ids = self._prompts.get(key)
        if ids is None:
            ids = self._write_prompt(instruction, num_images, None)
            ids.flags.writeable = False
            if len(self._prompts) >= _MAX_PROMPTS:
                self._prompts.clear()
            self._prompts[key] = ids
        return ids

    def encode(
        self,
        instruction: str,
        num_images: int,
        *,
        codes: Ids | None = None,
        not_learned: NDArray[np.bool_] | None = None,
        answer: str | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> EncodedRow:
        """The row of an instruction with its images and its answer: an action's codes int32[tokens], or a text.

        not_learned: bool[tokens], codes that are not labels.

        Raises RowError where the row needs more than `data.max_seq_len` tokens, DataError unless there is exactly one answer.
        """
        prompt = self.prompt(instruction, num_images, state)
        if codes is not None and answer is None:
            learned = self._action_ids(codes)
        elif answer is not None and codes is None:
            learned = self._answer_ids(answer)
        else:
            raise DataError("a sample has an action and an answer, or neither: exactly one of them is learned")
        input_ids = np.concatenate((prompt, learned, self._end))
        self._check_length(len(input_ids), len(prompt), num_images, len(learned))
        supervised = np.zeros(len(input_ids), np.uint8)
        supervised[len(prompt) :] = 1
        if not_learned is not None:
            supervised[len(prompt) : -1][not_learned] = 0
        return EncodedRow(input_ids, supervised)

    def encode_actions(self, instruction: str, num_images: int, codes: Ids) -> ActionRows:
        """As `encode`, of N samples of one instruction. codes: int32[N, tokens].

        Raises as `encode` does; ValueError where the prompt has a state, which differs from sample to sample.
        """
        if self._needs_state:
            raise ValueError("the prompts have states: encode the samples one by one")
        prompt, learned = self.prompt(instruction, num_images), self._action_ids(codes)
        length = len(prompt) + learned.shape[1] + 1
        self._check_length(length, len(prompt), num_images, learned.shape[1])
        input_ids, supervised = np.empty((len(learned), length), np.int32), np.zeros(length, np.uint8)
        input_ids[:, : len(prompt)] = prompt
        input_ids[:, len(prompt) : -1] = learned
        input_ids[:, -1] = self._end
        supervised[len(prompt) :] = 1
        input_ids.flags.writeable = supervised.flags.writeable = False
        return ActionRows(input_ids, supervised)

    @property
    def needs_state(self) -> bool:
        """Whether a prompt has the robot's state."""
        return self._needs_state

    @property
    def image_frame(self) -> str:
        """One image in a text: its placeholder, and what the model has around it."""
        return "" if self._image is None else f"{self._image.before}{self._image.token}{self._image.after}"

    def with_image_frames(self, text: str) -> str:
        """The text of a chat template, with the model's text around each placeholder, also where the template has it already
        (Qwen-VL). Marked placeholders, from data, stay."""
        if self._image is None or self.image_frame == self._image.token:
            return text
        before, token, after = (re.escape(part) for part in (self._image.before, self._image.token, self._image.after))
        return re.sub(f"(?:{before})?(?<!{OPEN}){token}(?:{after})?", lambda _: self.image_frame, text)

    def expand(self, ids: Ids, supervised: NDArray[np.uint8], num_images: int) -> EncodedRow:
        """Repeat each image's placeholder `num_tokens` times. Raises DataError where there are not `num_images` placeholders."""
        image = self._image
        if image is None:
            return EncodedRow(ids, supervised)
        places = ids == image.token_id
        if image.after_bos and int(places.sum()) != num_images:
            raise DataError(
                f"{num_images} images in a dialogue: a model of the family {image.family} takes them behind the first token of "
                "an instruction and its answer, and not in turns; set data.dialogue.template to openvla"
            )
        if int(places.sum()) != num_images:
            raise DataError(
                f"the prompt holds {image.token!r} {int(places.sum())} times for {num_images} images: take that text out of "
                "the instruction"
            )
        if not num_images:
            return EncodedRow(ids, supervised)
        repeats = np.where(places, image.num_tokens, 1)
        return EncodedRow(np.repeat(ids, repeats), np.repeat(supervised, repeats))

    def _check_length(self, length: int, prompt: int, num_images: int, answer: int) -> None:
        if length > self._max_seq_len:
            raise RowError(
                f"the row needs {length} tokens ({prompt} of the prompt with {num_images} images, {answer} of the answer, 1 end "
                f"token), but data.max_seq_len is {self._max_seq_len}: raise it, nothing is cut"
            )

    def _action_ids(self, codes: Ids) -> Ids:
        if self._id_of_code is None:
            raise DataError("a sample has an action, but this processor has no action codec; run loader-prepare")
        try:
            return self._id_of_code[
                codes.astype(np.uint32)
            ]  # unsigned: a negative code is out of range, not counted from the end
        except IndexError as error:
            if int(codes.min()) < 0:
                raise DataError(f"action code {int(codes.min())} is negative") from error
            raise DataError(f"action code {int(codes.max())}: there are {len(self._id_of_code)} codes") from error

    def _answer_ids(self, answer: str) -> Ids:
        self._check_text("answer", answer)
        ids = int32_array(self._tokenizer.encode(self._dialogue.answer_opening + answer))
        if self._image is not None and (ids == self._image.token_id).any():
            raise DataError(
                f"the answer holds {self._image.token!r}, which stands for an image: take it out of the text"
            )
        return ids

    def _state_text(self, state: NDArray[np.float32] | None) -> str:
        if state is None:
            raise RowError(
                "data.state is text, and a sample has no state: set data.state=none, or use data with states"
            )
        if self._state is None:
            raise RowError("data.state is text, but its statistics are not known; run loader-prepare")
        return self._state.write(state)

    def _write_prompt(self, instruction: str, num_images: int, state: str | None) -> Ids:
        image, dialogue = self._image, self._dialogue
        self._check_text("instruction", instruction)
        if dialogue.template == "openvla":  # which writes it in lower case: </S> would become the token </s>
            self._check_text("instruction", instruction.lower())
        if num_images and image is None:
            raise RowError(
                f"a sample has {num_images} images, but the model takes text only; use a vision-language model or drop them"
            )
        if image is None or dialogue.writes_bos:
            ids = self._inline(instruction, num_images, state)
        else:
            ids = self._placed(image, instruction, num_images, state)
        return self.expand(int32_array(ids), np.zeros(len(ids), np.uint8), num_images).input_ids

    def _check_text(self, name: str, text: str) -> None:
        """Raises DataError for a control token: instructions are short and written for the robot, so it is a mistake."""
        found = self._control.find(text, of_assistant=name == "answer")
        is_counted = self._image is not None and found == self._image.token and not self._image.after_bos
        if found is not None and not is_counted:
            raise DataError(f"the {name} holds {found!r}, which gives rows their structure: take it out of the text")

    def _inline(self, instruction: str, num_images: int, state: str | None) -> list[int]:
        """The ids for models without images, and for chat templates, which write the begin-of-sequence token themselves."""
        image, dialogue = self._image, self._dialogue
        text = self.with_image_frames(
            dialogue.prompt(instruction, num_images, "" if image is None else image.token, state)
        )
        return [*([] if dialogue.writes_bos else self._tokenizer.leading), *self._tokenizer.encode(text)]

    def _placed(self, image: ImageSpec, instruction: str, num_images: int, state: str | None) -> list[int]:
        """The ids with images in the text, after the begin-of-sequence token, or before everything: see `dialogue`."""
        encode, leading = self._tokenizer.encode, self._tokenizer.leading
        piece = self.image_frame
        if image.before_bos:  # PaliGemma, whose tokenizer leaves that token to its processor
            bos = self._tokenizer.named_id("bos_token")
            text = self._dialogue.prompt(instruction, num_images, "", state) + "\n"
            return [*encode(piece * num_images), *([] if bos is None else [bos]), *encode(text)]
        if image.after_bos:  # OpenVLA, whose tokenizer has no placeholder
            text = self._dialogue.prompt(instruction, num_images, "", state)
            return [*leading, *[image.token_id] * num_images, *encode(text)]
        if self._dialogue.images_after_bos:
            text = self._dialogue.prompt(instruction, num_images, "", state)
            return [*leading, *encode(piece * num_images), *encode(text)]
        return [*leading, *encode(self._dialogue.prompt(instruction, num_images, piece, state))]
