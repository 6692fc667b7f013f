"""Which special tokens the assistant's text may contain as tokens: `data.dialogue.assistant_tokens`, checked."""

from __future__ import annotations

from stoker_proto.config import DialogueConfig
from stoker_proto.errors import ConfigError
from stoker_proto.images.spec import ImageSpec
from stoker_proto.text.control_tokens import SPOKEN, is_action_token
from stoker_proto.text.dialogue import Dialogue
from stoker_proto.text.tokenizer import TextTokenizer
from stoker_proto.text.turns import Turn


def spoken_tokens(
    config: DialogueConfig, dialogue: Dialogue, tokenizer: TextTokenizer, end_token: str, image: ImageSpec | None
) -> tuple[str, ...]:
    """The tokens, sorted. Raises ConfigError for a token that the tokenizer lacks, or that gives rows their structure."""
    special = set(tokenizer.control_tokens())
    if config.assistant_tokens is None:
        return tuple(sorted(special.intersection(SPOKEN)))
    structure = _structure(dialogue, tokenizer, end_token, image)
    for token in config.assistant_tokens:
        if tokenizer.id_of(token) is None:
            raise ConfigError(
                f"data.dialogue.assistant_tokens has {token!r}, which is no token of the tokenizer: name the tokenizer's own"
            )
        if token in structure or is_action_token(token):
            raise ConfigError(
                f"data.dialogue.assistant_tokens has {token!r}, which gives rows their structure: text from data could then "
                "open or end turns; leave it out"
            )
    return tuple(sorted(special.intersection(config.assistant_tokens)))


def _structure(dialogue: Dialogue, tokenizer: TextTokenizer, end_token: str, image: ImageSpec | None) -> set[str]:
    """Tokens with a role in the tokenizer, and those that the template writes around turns."""
    found = {token for name, token in tokenizer.names.items() if name.endswith("_token")} | {end_token}
    found |= set(dialogue.openers) | ({image.token} if image is not None else set())
    if dialogue.template == "chat_template":
        turns = [Turn(role="user", text="words"), Turn(role="assistant", text="words"), Turn(role="user", text="words")]
        written = [dialogue.prompt("words", 0, ""), dialogue.chat.try_turns(turns[:2]), dialogue.chat.try_turns(turns)]
        text = "".join(filter(None, written))
        found |= {token for token in tokenizer.control_tokens() if token in text and token not in SPOKEN}
    return found
