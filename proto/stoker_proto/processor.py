"""The one object that turns observations and text into tokens, and tokens into actions.

Loaders, evaluation, the policy and the exported model all use it, so training and use cannot differ: `encode(...)` is
`prompt(...)` followed by the answer and its end token. Letters: T tokens of a row, K timesteps, D dimensions.

    prompt   <s><|User|> <image>x16 Push the cube <|Assistant|>                      not supervised
    answer   the action's tokens, or " a text"                                       supervised
    end      </s>                                                                    supervised

A row longer than `data.max_seq_len` raises an error with the number of tokens that it needs: nothing is cut.
Dialogues of several turns (`encode_turns`) and plain text (`texts`) need no action codec.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from stoker_proto.actions import ActionCodec, ActionVocabulary, codec_from_json
from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.config import AugmentConfig, Config, ImageConfig
from stoker_proto.errors import ConfigError, DataError, RowError
from stoker_proto.hashing import canonical_json, fingerprint
from stoker_proto.images.families import read_image_spec
from stoker_proto.images.padding import choose_padding
from stoker_proto.images.spec import ImageSpec
from stoker_proto.images.transport import ImageCoder
from stoker_proto.images.views import Measurements, Views, views_of_sources
from stoker_proto.model_folder import ModelFolder
from stoker_proto.text.assistant_tokens import spoken_tokens
from stoker_proto.text.chat_rows import DialogueRows, DialogueSample
from stoker_proto.text.control_tokens import ControlTokens
from stoker_proto.text.dialogue import Dialogue
from stoker_proto.text.exported_template import exported_template
from stoker_proto.text.functions import Tools
from stoker_proto.text.labelled_rows import LabelledRows
from stoker_proto.text.rows import ActionRows, EncodedRow, RowForm, RowWriter
from stoker_proto.text.state_text import StateText
from stoker_proto.text.text_notes import TextNotes
from stoker_proto.text.text_rows import ROWS_VERSION, TextRows
from stoker_proto.text.tokenizer import TextTokenizer, load_tokenizer
from stoker_proto.text.turn_ends import TurnEnds, find_turn_ends
from stoker_proto.text.turns import Turn

__all__ = ["EncodedRow", "ImageSpec", "Processor"]

VERSION = 2
"""Version of the JSON. Raise it when the same JSON would give other rows, or the tokenizer's fingerprint is computed
otherwise."""
FILE, TOKENIZER_FILE = "stoker_processor.json", "tokenizer.json"
_DIALOGUE = ("dialogue", "end_token", "max_seq_len", "overlong", "needs_state")
"""Names in the JSON that determine the text of a row."""


@dataclass(frozen=True, kw_only=True)
class ProcessorParts:
    """What a processor is made of besides the tokenizer, and its JSON."""

    image: ImageSpec | None
    image_config: ImageConfig
    augment: AugmentConfig
    dialogue: Dialogue
    end_token: str
    max_seq_len: int
    overlong: str
    needs_state: bool
    """Whether `data.state` is text."""
    state: StateText | None
    """Writes the state; None until loader-prepare has its statistics."""
    codec: ActionCodec | None
    vocabulary: ActionVocabulary | None
    num_images: tuple[int, int] | None = None
    """Fewest and most images of a sample with an action in training. None: not known, and not in the JSON."""
    views: Views | None = None
    """Images of a camera frame (`data.options.views`). None: the frame itself, and not in the JSON."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats exact."""
        seen = {} if self.num_images is None else {"num_images": list(self.num_images)}
        cut = {} if self.views is None else {"views": self.views.to_json()}
        return {
            **seen,
            **cut,
            "image": None if self.image is None else self.image.to_json(),
            "image_config": {
                name: value
                for name, value in asdict(self.image_config).items()
                if name not in ("pad_to_square", "size")
            },
            "augment": asdict(self.augment),
            "dialogue": self.dialogue.to_json(),
            "end_token": self.end_token,
            "max_seq_len": self.max_seq_len,
            "overlong": self.overlong,
            "needs_state": self.needs_state,
            "state": None if self.state is None else self.state.to_json(),
            "codec": None if self.codec is None else self.codec.to_json(),
            "vocabulary": None if self.vocabulary is None else self.vocabulary.to_json(),
        }

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The parts that `to_json` described. Raises KeyError, TypeError, ValueError or DataError for a damaged tree."""
        return cls(
            image=None if tree["image"] is None else ImageSpec.from_json(tree["image"]),
            image_config=ImageConfig(**tree["image_config"]),
            augment=AugmentConfig(**tree["augment"]),
            dialogue=Dialogue.from_json(tree["dialogue"]),
            end_token=tree["end_token"],
            max_seq_len=tree["max_seq_len"],
            overlong=str(tree.get("overlong", "error")),  # older exported models have none of these three
            needs_state=bool(tree.get("needs_state", False)),
            state=None if tree.get("state") is None else StateText.from_json(tree["state"]),
            codec=None if tree["codec"] is None else codec_from_json(tree["codec"]),
            vocabulary=None if tree["vocabulary"] is None else ActionVocabulary.from_json(tree["vocabulary"]),
            num_images=None if tree.get("num_images") is None else _range(tree["num_images"]),
            views=None if tree.get("views") is None else Views.parse(tree["views"]),
        )

    def control_tokens(self, tokenizer: TextTokenizer) -> ControlTokens:
        """Tokens that text must not be able to write: special tokens, images, and others that the template opens turns with."""
        special = [*tokenizer.control_tokens(), self.end_token]
        if self.image is not None:
            special.append(self.image.token)
        openers = list(self.dialogue.openers)
        if self.dialogue.template == "chat_template":
            opening = self.dialogue.prompt("words", 0, "")
            openers += [token for token in tokenizer.plain_added_tokens() if token in opening]
        return ControlTokens(special, openers, self.dialogue.spoken)


class Processor:
    """Observations and text <-> tokens <-> actions. Made by `build`, `from_json` or `load`. Safe to use from many threads."""

    def __init__(self, tokenizer: TextTokenizer, parts: ProcessorParts) -> None:
        self._tokenizer, self._parts = tokenizer, parts
        self.image, self.codec, self.vocabulary = parts.image, parts.codec, parts.vocabulary
        end_id = tokenizer.id_of(parts.end_token)
        if end_id is None:
            raise ConfigError(
                f"data.dialogue.end is {parts.end_token!r}: the tokenizer has no such token; name one it has"
            )
        self.end_id: int = end_id
        pad_id = tokenizer.named_id("pad_token")
        self.pad_id: int = end_id if pad_id is None else pad_id
        control = parts.control_tokens(tokenizer)
        self._form = RowForm(
            tokenizer=tokenizer,
            control=control,
            dialogue=parts.dialogue,
            image=parts.image,
            end_id=end_id,
            max_seq_len=parts.max_seq_len,
            overlong=parts.overlong,
        )
        self._rows = RowWriter(self._form, parts.vocabulary, state=parts.state, needs_state=parts.needs_state)
        self._dialogues = DialogueRows(self._form, self._rows)
        self._labelled = LabelledRows(self._form, self._rows.expand)
        self.texts = TextRows(tokenizer, control, end_id, parts.max_seq_len)
        """Writes plain text as rows."""
        self.control = control
        """Which texts in the data are control tokens."""
        self.notes = TextNotes(control, parts.dialogue)
        """What of a text is written otherwise than it may be meant."""
        self.coder = ImageCoder(parts.image, parts.image_config, parts.augment) if parts.image is not None else None

    @classmethod
    def build(cls, config: Config, codec: ActionCodec | None, states: ActionStatistics | None = None) -> Self:
        """From the config and the JSON files of `model.base_model_path`. Raises ConfigError.

        codec, states: from loader-prepare. Without them the processor cannot write rows with actions, or with states as text.
        """
        folder = ModelFolder(config.model.base_model_path)
        tokenizer = TextTokenizer.from_folder(folder)
        data = config.data
        end = data.dialogue.end or tokenizer.names.get("eos_token")
        if end is None:
            raise ConfigError(f"{folder.path}: the tokenizer names no end-of-sequence token; set data.dialogue.end")
        chat_template = folder.chat_template() if data.dialogue.template in ("auto", "chat_template") else None
        dialogue = Dialogue.build(
            data.dialogue, chat_template, tokenizer.names, model_type=str(folder.config.get("model_type", ""))
        )
        if data.state == "text" and dialogue.template == "openvla":
            raise ConfigError(
                "data.state is text, and data.dialogue.template auto is openvla for this model, which has no place for it: use "
                "stoker, or custom with {state}"
            )
        image = read_image_spec(folder, tokenizer.tokenizer, data.image.size)
        if image is not None:  # the padding is one of the steps from here on
            image = choose_padding(image, data.image.pad_to_square, folder)
        vocabulary = None if codec is None else tokenizer.add_actions(data.action.vocabulary, codec.num_codes)
        parts = ProcessorParts(
            image=image,
            image_config=data.image.resolved(),
            augment=data.augment,
            dialogue=replace(dialogue, spoken=spoken_tokens(data.dialogue, dialogue, tokenizer, end, image)),
            end_token=end,
            max_seq_len=data.max_seq_len,
            overlong=data.overlong,
            needs_state=data.state == "text",
            state=StateText(states) if states is not None and data.state == "text" else None,
            codec=codec,
            vocabulary=vocabulary,
            views=views_of_sources({f"source {n}": source.options for n, source in enumerate(data.all_sources())}),
        )
        return cls(tokenizer, parts)

    def with_num_images(self, seen: tuple[int, int] | None) -> Processor:
        """The same processor with the fewest and most images of the samples with actions, which policies check.

        It makes the same rows and has the same fingerprints.
        """
        return type(self)(self._tokenizer, replace(self._parts, num_images=seen))

    @property
    def num_images(self) -> tuple[int, int] | None:
        """Fewest and most images of a sample with an action in training; None where not known."""
        return self._parts.num_images

    @property
    def images_per_frame(self) -> int:
        """Images that `see` makes of a camera frame."""
        return 1 if self._parts.views is None else len(self._parts.views)

    def see(self, frames: Sequence[NDArray[Any]], measurements: Measurements) -> Sequence[NDArray[Any]]:
        """The images of a sample's camera frames, as the loader makes them: the frames, or the views of each. Raises DataError.

        measurements: of this moment, by their names in the dataset; see `images.views`.
        """
        views = self._parts.views
        return frames if views is None else [image for frame in frames for image in views.cut(frame, measurements)]

    @property
    def needed_measurements(self) -> tuple[str, ...]:
        """Names of the measurements that `see` needs; their shapes are in `images.views.HAND_SHAPES`."""
        return () if self._parts.views is None else self._parts.views.needed

    @property
    def needs_state(self) -> bool:
        """Whether instructions include the robot's state (`data.state: text`)."""
        return self._parts.needs_state

    @cached_property
    def turn_ends(self) -> TurnEnds:
        """The tokens at which learned turns and answers end, and at which an exported model has to stop."""
        if self._parts.dialogue.template != "chat_template":
            return TurnEnds((self.end_id,))
        tokens = (*self._tokenizer.control_tokens(), *self._tokenizer.plain_added_tokens())
        ids = {self._tokenizer.id_of(token) for token in tokens}
        found = find_turn_ends(self._encode_probe, ids.__contains__)
        return TurnEnds(tuple(sorted({*found.ids, self.end_id})), found.words)

    def _encode_probe(self, turns: Sequence[Turn], tools: Tools) -> list[EncodedRow]:
        """The rows of a short dialogue, whatever `data.max_seq_len` is."""
        rows = DialogueRows(replace(self._form, max_seq_len=1 << 20, overlong="error"), self._rows)
        [found] = rows.encode([DialogueSample(turns, tools=tools)])
        if isinstance(found, DataError):
            raise found
        return found

    @property
    def state_width(self) -> int | None:
        """Numbers of the robot's state that instructions include; None where they include none."""
        return None if self._parts.state is None else self._parts.state.statistics.dim

    @property
    def writes_reasoning(self) -> bool:
        """Whether the dialogue's template has a place for `Turn.reasoning`."""
        return self._parts.dialogue.writes_reasoning

    @property
    def image_token_id(self) -> int | None:
        """The id that the model replaces by image features; None for a model of text only."""
        return None if self.image is None else self.image.token_id

    @property
    def vocab_size_needed(self) -> int:
        """Fewest rows that the model's embedding must have: the largest id + 1."""
        return self._tokenizer.size

    def prompt(self, instruction: str, num_images: int, state: NDArray[np.float32] | None = None) -> NDArray[np.int32]:
        """int32[T]: the prompt that generation starts from, identical to the beginning of `encode`. Raises DataError.

        state: float32[S], required where `data.state` is text.
        """
        return self._rows.prompt(instruction, num_images, state)

    def encode(
        self,
        instruction: str,
        num_images: int,
        *,
        codes: NDArray[np.int32] | None = None,
        is_pad: NDArray[np.bool_] | None = None,
        answer: str | None = None,
        state: NDArray[np.float32] | None = None,
    ) -> EncodedRow:
        """The row of a sample with its action's codes int32[tokens], or with a text as answer. Raises DataError.

        is_pad: bool[K], timesteps of the action that are not labels.
        """
        hidden = None if is_pad is None or self.codec is None else self.codec.tokens_of(is_pad)
        return self._rows.encode(instruction, num_images, codes=codes, not_learned=hidden, answer=answer, state=state)

    def encode_actions(self, instruction: str, num_images: int, codes: NDArray[np.int32]) -> ActionRows | None:
        """As `encode`, of N samples of one instruction at once, codes int32[N, tokens].

        None where prompts have states, so that each sample has its own. Raises DataError.
        """
        return None if self._rows.needs_state else self._rows.encode_actions(instruction, num_images, codes)

    def encode_turns(self, turns: Sequence[Turn], num_images: int = 0, tools: Tools = ()) -> EncodedRow:
        """The row of a dialogue, whose learned turns are labels. Raises DataError; see `text/chat_rows.py`.

        Raises RowError where the model's chat template rewrites history, so that the dialogue needs several rows.
        """
        [rows] = self._dialogues.encode([DialogueSample(turns, num_images, tools)])
        if isinstance(rows, DataError):
            raise rows
        if len(rows) != 1:
            raise RowError(
                f"the model's chat template rewrites history, and the dialogue needs {len(rows)} rows: use encode_dialogues"
            )
        return rows[0]

    def encode_dialogues(self, dialogues: Sequence[DialogueSample]) -> list[list[EncodedRow] | DataError]:
        """The rows of several dialogues, faster than one by one. An error takes the place of a dialogue's rows."""
        return self._dialogues.encode(dialogues)

    def encode_labelled(
        self, input_ids: NDArray[np.integer[Any]], labels: NDArray[np.integer[Any]], num_images: int = 0
    ) -> EncodedRow:
        """The row of token ids int[T] with labels int[T], -100 where nothing is learned; see `text/labelled_rows.py`.

        Raises DataError, RowError where it does not fit.
        """
        return self._labelled.encode(input_ids, labels, num_images)

    @property
    def divides_dialogues(self) -> bool:
        """Whether a dialogue may need several rows, because the model's chat template rewrites history."""
        return self._dialogues.may_divide

    def encode_image(self, frame: NDArray[np.uint8] | NDArray[np.uint16], augment_key: int | None) -> bytes:
        """The bytes of a frame, uint8[H, W, 3] or depth uint16[H, W] in mm; see `images.transport.ImageCoder.encode`."""
        coder = self.coder or self._image_coder()
        return coder.encode(frame, augment_key)

    def image_pixels(self, frame: NDArray[np.uint8] | NDArray[np.uint16]) -> NDArray[np.uint8]:
        """The model's pixels uint8[height, width, 3] of a frame, without the losses of a JPEG. Raises DataError."""
        return self._image_coder().pixels(frame, None)

    def decode_image(self, data: bytes | memoryview, out: NDArray[np.uint8]) -> None:
        """Write the image in the bytes of `encode_image` into uint8[height, width, 3]. Raises RemoteProtocolError."""
        self._image_coder().decode(data, out)

    def actions_from_ids(self, ids: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """int[tokens] -> float32[K, D] in action units. Raises DataError for another id or a wrong number of ids."""
        if self.codec is None or self.vocabulary is None:
            raise DataError("this processor has no action codec: tokens cannot become actions")
        actions: NDArray[np.float32] = self.codec.decode(self.vocabulary.to_codes(ids)[None])[0]
        return actions

    def token_texts(self, ids: NDArray[np.integer[Any]]) -> list[str]:
        """The text of each token, special ones by name, to be shown to a user; see `TextTokenizer.texts_of`."""
        return self._tokenizer.texts_of(ids.tolist())

    def plain_text(self, ids: NDArray[np.integer[Any]]) -> str:
        """The text of the ids without added tokens, such as those of images and turns, and with single spaces."""
        kept = [number for number in ids.tolist() if not self.is_added(number)]
        return " ".join(str(self._tokenizer.tokenizer.decode(kept)).split())

    def chat_template(self) -> str | None:
        """The template that was trained, as jinja2 source for transformers; None for models that have images before all text."""
        if self.image is not None and self.image.before_bos and self._parts.dialogue.template != "chat_template":
            return None
        leading = "".join(self._tokenizer.tokenizer.id_to_token(number) or "" for number in self._tokenizer.leading)
        image = "" if self.image is None else self.image.token
        return exported_template(self._parts.dialogue, leading=leading, end=self._parts.end_token, image=image)

    def is_added(self, token: int) -> bool:
        """Whether the id is one of the tokenizer's added tokens, special or not."""
        return token in self._tokenizer.added_ids

    def to_json(self) -> str:
        """Canonical JSON of everything but the tokenizer, of which it contains only the fingerprint."""
        tokenizer = {"tokenizer": self._tokenizer.fingerprint, "special_tokens": self._tokenizer.names}
        return canonical_json({"version": VERSION, **tokenizer, **self._parts.to_json()})

    @classmethod
    def from_json(cls, text: str, tokenizer_file: Path) -> Self:
        """The processor that `to_json` described. tokenizer_file: the tokenizer.json that it was made with.

        Raises DataError for another version or damaged text, ConfigError for another tokenizer.
        """
        try:
            tree = json.loads(text)
            if tree["version"] != VERSION:
                raise DataError(
                    f"a processor of version {tree['version']}: this program reads {VERSION}; build it anew"
                )
            tokenizer = TextTokenizer(load_tokenizer(tokenizer_file), dict(tree["special_tokens"]))
            parts = ProcessorParts.from_json(tree)
            expected = tree["tokenizer"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not the JSON of a processor ({type(error).__name__}: {error}); build it anew") from error
        if tokenizer.fingerprint != expected:
            raise ConfigError(
                f"{tokenizer_file}: not the tokenizer that the processor was made with (fingerprint "
                f"{tokenizer.fingerprint[:12]}, expected {expected[:12]}); give every host the same model folder"
            )
        if (
            parts.vocabulary is not None
            and tokenizer.add_actions(parts.vocabulary.mode, parts.vocabulary.num_codes) != parts.vocabulary
        ):
            raise ConfigError(f"{tokenizer_file}: its action tokens have other ids than those that were trained")
        return cls(tokenizer, parts)

    def save(self, folder: Path) -> None:
        """Write stoker_processor.json and tokenizer.json (with action tokens) into the folder, which is made if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(folder / TOKENIZER_FILE)
        (folder / FILE).write_text(self.to_json() + "\n", encoding="ascii")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The processor that `save` wrote. Raises ConfigError or DataError."""
        file = Path(folder) / FILE
        try:
            text = file.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{file}: the processor cannot be read ({error}); name a folder that Stoker exported"
            ) from error
        return cls.from_json(text, Path(folder) / TOKENIZER_FILE)

    def fingerprints(self) -> dict[str, str]:
        """Name -> fingerprint, "none" where the part does not exist. `image_libraries`: those that make the image bytes."""
        tree = json.loads(self.to_json())
        image = {name: tree[name] for name in ("image", "image_config", "augment")}
        if "views" in tree:
            image["views"] = tree["views"]
        dialogue = {name: tree[name] for name in _DIALOGUE}
        return {
            "tokenizer": tree["tokenizer"],
            "image": "none" if self.coder is None else fingerprint(image),
            "image_libraries": "none" if self.coder is None else self.coder.libraries,
            "dialogue": fingerprint(dialogue),
            "state": "none" if tree["state"] is None else fingerprint(tree["state"]),
            "codec": "none" if self.codec is None else self.codec.fingerprint,
            "vocabulary": "none" if tree["vocabulary"] is None else fingerprint(tree["vocabulary"]),
        }

    @property
    def text_fingerprint(self) -> str:
        """Fingerprint of everything that determines the rows of dialogues and texts. Known before a codec is fitted."""
        found = self.fingerprints()
        return fingerprint(
            [VERSION, ROWS_VERSION, self._tokenizer.names, found["tokenizer"], found["dialogue"], found["image"]]
        )

    def _image_coder(self) -> ImageCoder:
        if self.coder is None:
            raise DataError(
                "a sample has an image, but the model takes text only; use a vision-language model or drop images"
            )
        return self.coder


def _range(found: Any) -> tuple[int, int]:
    least, most = map(int, found)
    if not 0 <= least <= most:
        raise ValueError(f"num_images is {found}: [fewest, most] is expected")
    return least, most
