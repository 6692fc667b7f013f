"""What a processor is made of beside the tokenizer, and its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self

from stoker_proto.actions import ActionCodec, ActionVocabulary, codec_from_json
from stoker_proto.config import AugmentConfig, ImageConfig
from stoker_proto.images.spec import ImageSpec
from stoker_proto.text.control_tokens import ControlTokens
from stoker_proto.text.dialogue import Dialogue
from stoker_proto.text.state_text import StateText
from stoker_proto.text.tokenizer import TextTokenizer

DIALOGUE = ("dialogue", "end_token", "max_seq_len", "overlong", "needs_state")
"""Of the JSON: what decides the text of a row."""


@dataclass(frozen=True, kw_only=True)
class ProcessorParts:
    """Plain values and small objects; see `Processor`."""

    image: ImageSpec | None
    image_config: ImageConfig
    augment: AugmentConfig
    dialogue: Dialogue
    end_token: str
    max_seq_len: int
    overlong: str
    needs_state: bool
    """`data.state` is text ..."""
    state: StateText | None
    """... and this writes it, once loader-prepare knows its statistics."""
    codec: ActionCodec | None
    vocabulary: ActionVocabulary | None
    num_images: tuple[int, int] | None = None
    """Fewest and most images of a sample with an action, as a trainer saw them; None: not known, and not in the JSON."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats exact."""
        seen = {} if self.num_images is None else {"num_images": list(self.num_images)}
        return {
            **seen,
            "image": None if self.image is None else self.image.to_json(),
            "image_config": asdict(self.image_config),
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
        """The parts that `to_json` described. Raises KeyError, TypeError, ValueError or DataError for what is none."""
        return cls(
            image=None if tree["image"] is None else ImageSpec.from_json(tree["image"]),
            image_config=ImageConfig(**tree["image_config"]),
            augment=AugmentConfig(**tree["augment"]),
            dialogue=Dialogue.from_json(tree["dialogue"]),
            end_token=tree["end_token"],
            max_seq_len=tree["max_seq_len"],
            overlong=str(tree.get("overlong", "error")),  # these three came later: models were exported without
            needs_state=bool(tree.get("needs_state", False)),
            state=None if tree.get("state") is None else StateText.from_json(tree["state"]),
            codec=None if tree["codec"] is None else codec_from_json(tree["codec"]),
            vocabulary=None if tree["vocabulary"] is None else ActionVocabulary.from_json(tree["vocabulary"]),
            num_images=None if tree.get("num_images") is None else _range(tree["num_images"]),
        )

    def control_tokens(self, tokenizer: TextTokenizer) -> ControlTokens:
        """What text must not be able to write: special tokens, images, and what else the template opens turns with."""
        special = [*tokenizer.control_tokens(), self.end_token]
        if self.image is not None:
            special.append(self.image.token)
        openers = list(self.dialogue.openers)
        if self.dialogue.template == "chat_template":
            opening = self.dialogue.prompt("words", 0, "")
            openers += [token for token in tokenizer.plain_added_tokens() if token in opening]
        return ControlTokens(special, openers)


def _range(found: Any) -> tuple[int, int]:
    least, most = map(int, found)
    if not 0 <= least <= most:
        raise ValueError(f"num_images is {found}: [fewest, most] is expected")
    return least, most
