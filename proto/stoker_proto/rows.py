"""Prompt and answer as token ids: the row that is trained, and the prefix that generation starts from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stoker_proto.actions.vocabulary import ActionVocabulary
from stoker_proto.dialogue import Dialogue
from stoker_proto.errors import DataError
from stoker_proto.image_spec import ImageSpec
from stoker_proto.tokenizer import TextTokenizer

Ids = NDArray[np.int32]
_MAX_PROMPTS = 8192  # remembered: instructions repeat, and a dict hit costs a thousandth of tokenising


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRow:
    """One row of training."""

    input_ids: Ids  # [T]
    supervised: NDArray[np.uint8]  # [T]: 1 where the token is a label


class RowWriter:
    """Writes rows for one tokenizer, dialogue and model."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        dialogue: Dialogue,
        image: ImageSpec | None,
        vocabulary: ActionVocabulary | None,
        end_id: int,
        max_seq_len: int,
    ) -> None:
        self._tokenizer, self._dialogue, self._image = tokenizer, dialogue, image
        self._max_seq_len = max_seq_len
        self._end = np.array([end_id], np.int32)
        # A table, because turning codes into ids one row at a time costs more by arithmetic.
        self._id_of_code: Ids | None = None
        if vocabulary is not None:
            self._id_of_code = vocabulary.to_ids(np.arange(vocabulary.num_codes))
        self._prompts: dict[tuple[str, int], Ids] = {}

    def prompt(self, instruction: str, num_images: int) -> Ids:
        """int32[T], read-only: what generation starts from, and the beginning of `encode`'s row. Raises DataError."""
        key = (instruction, num_images)
        ids = self._prompts.get(key)
        if ids is None:
            ids = self._write_prompt(instruction, num_images)
            ids.flags.writeable = False
            if len(self._prompts) >= _MAX_PROMPTS:
                self._prompts.clear()
            self._prompts[key] = ids
        return ids

    def encode(
        self, instruction: str, num_images: int, *, codes: Ids | None = None, answer: str | None = None
    ) -> EncodedRow:
        """The row of an instruction with its images and its answer: int32[tokens] codes of an action, or words.

        Raises DataError where the row needs more than `data.max_seq_len` tokens, or the answer is not one of the two.
        """
        prompt = self.prompt(instruction, num_images)
        if codes is not None and answer is None:
            learned = self._action_ids(codes)
        elif answer is not None and codes is None:
            learned = self._answer_ids(answer)
        else:
            raise DataError("a sample has an action and an answer, or neither: exactly one of them is learned")
        input_ids = np.concatenate((prompt, learned, self._end))
        if len(input_ids) > self._max_seq_len:
            raise DataError(
                f"the row needs {len(input_ids)} tokens ({len(prompt)} of the prompt with {num_images} images, {len(learned)} of "
                f"the answer, 1 end token), but data.max_seq_len is {self._max_seq_len}: raise it, nothing is cut"
            )
        supervised = np.zeros(len(input_ids), np.uint8)
        supervised[len(prompt) :] = 1
        return EncodedRow(input_ids, supervised)

    def _action_ids(self, codes: Ids) -> Ids:
        if self._id_of_code is None:
            raise DataError("a sample has an action, but this processor has no action codec; run loader-prepare")
        try:
            return self._id_of_code[
                codes.astype(np.uint32)
            ]  # unsigned: a negative code is out of range, not the last one
        except IndexError as error:
            if int(codes.min()) < 0:
                raise DataError(f"action code {int(codes.min())} is negative") from error
            raise DataError(f"action code {int(codes.max())}: there are {len(self._id_of_code)} codes") from error

    def _answer_ids(self, answer: str) -> Ids:
        ids = np.array(self._tokenizer.encode(self._dialogue.answer_opening + answer), np.int32)
        if self._image is not None and (ids == self._image.token_id).any():
            raise DataError(
                f"the answer holds {self._image.token!r}, which stands for an image: take it out of the text"
            )
        return ids

    def _write_prompt(self, instruction: str, num_images: int) -> Ids:
        image, dialogue = self._image, self._dialogue
        if num_images and image is None:
            raise DataError(
                f"a sample has {num_images} images, but the model takes text only; use a vision-language model or drop them"
            )
        if image is None or dialogue.writes_bos:
            ids = self._inline(instruction, num_images)
        else:
            ids = self._placed(image, instruction, num_images)
        array = np.array(ids, np.int32)
        return array if image is None else self._expand(array, image, num_images)

    def _inline(self, instruction: str, num_images: int) -> list[int]:
        """Of models without images, and of chat templates, which write the begin-of-sequence token themselves."""
        image, dialogue = self._image, self._dialogue
        text = dialogue.prompt(instruction, num_images, "" if image is None else image.token)
        if image is not None:
            text = text.replace(image.token, f"{image.before}{image.token}{image.after}")
        return [*([] if dialogue.writes_bos else self._tokenizer.leading), *self._tokenizer.encode(text)]

    def _placed(self, image: ImageSpec, instruction: str, num_images: int) -> list[int]:
        """Images in the text, behind the begin-of-sequence token, or in front of everything: see `dialogue`."""
        encode, leading = self._tokenizer.encode, self._tokenizer.leading
        piece = f"{image.before}{image.token}{image.after}"
        if image.before_bos:  # PaliGemma, whose tokenizer leaves that token to its processor
            bos = self._tokenizer.named_id("bos_token")
            text = self._dialogue.prompt(instruction, num_images, "") + "\n"
            return [*encode(piece * num_images), *([] if bos is None else [bos]), *encode(text)]
        if self._dialogue.images_after_bos:
            return [*leading, *encode(piece * num_images), *encode(self._dialogue.prompt(instruction, num_images, ""))]
        return [*leading, *encode(self._dialogue.prompt(instruction, num_images, piece))]

    def _expand(self, ids: Ids, image: ImageSpec, num_images: int) -> Ids:
        """Each image's one placeholder becomes `num_tokens` of them."""
        places = ids == image.token_id
        if int(places.sum()) != num_images:
            raise DataError(
                f"the prompt holds {image.token!r} {int(places.sum())} times for {num_images} images: take that text out of "
                "the instruction"
            )
        return np.repeat(ids, np.where(places, image.num_tokens, 1))
