"""How a sample is written as text: the text before the answer, by `data.dialogue.template`.

    auto            one of the next three: `openvla` for OpenVLA, `chat_template` for a model that has one, else `stoker`
    stoker          <|User|> {image} {instruction} <|Assistant|>              then the answer, then the end token
    openvla         In: What action should the robot take to {instruction, lower case}?\\nOut:_     (_: one space)
    chat_template   the model's own: one user turn, then the opening of the assistant's
    custom          data.dialogue.user, with {image}, {instruction} and {state}

Places of images: `stoker`, `custom` and `chat_template` have them in the text; `openvla` has them after the begin-of-sequence
token, like OpenVLA's patches. PaliGemma has all of them before everything and a line feed after the prompt, with every template
except the chat template. Without images `{image}` and the space after it are removed.

With `data.state: text` the instruction includes the robot's state, as in openpi: see `STATE`. Dialogues of several turns are in
`chat_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from stoker_proto.config import DialogueConfig
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.text.chat_template import ChatTemplate

TEMPLATES = {
    "stoker": "<|User|> {image} {instruction} <|Assistant|>",
    "openvla": "{image}In: What action should the robot take to {instruction}?\nOut: ",
}
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
STATE = "Task: {instruction}, State: {state};"
"""The instruction with a state, except in `custom`, which has its own `{state}`."""
CHAT_RULES = 2
"""Version of how a chat template is used; part of the fingerprint. Raise it when the same dialogue gives other rows."""
_SPACED = ("stoker",)  # templates with a space between the prompt and a text answer


@dataclass(frozen=True)
class Dialogue:
    """The text of a prompt, for one template."""

    template: str
    text: str
    """With {image}, {instruction} and {state}; the jinja2 source of `chat_template`."""
    names: dict[str, str]
    """Special tokens that a chat template may use, e.g. {"bos_token": "<s>"}."""
    options: dict[str, Any] = field(default_factory=dict)
    """Variables of a chat template."""
    spoken: tuple[str, ...] = ()
    """Special tokens that the assistant's text may contain as tokens, sorted."""

    @classmethod
    def build(
        cls, config: DialogueConfig, chat_template: str | None, names: dict[str, str], *, model_type: str = ""
    ) -> Self:
        """From the config, the model's chat template, its special tokens by name and its `model_type`. Raises ConfigError."""
        template = resolved(config, chat_template, model_type)
        if config.template_options and template != "chat_template":
            raise ConfigError(
                f"data.dialogue.template_options are variables of a chat template, and data.dialogue.template is "
                f"{config.template}{'' if template == config.template else f', here {template}'}: leave them out"
            )
        if template == "custom":
            if not config.user or "{instruction}" not in config.user:
                raise ConfigError(
                    f"data.dialogue.user is {config.user!r}: it needs {{instruction}}, and {{image}} for images"
                )
            return cls("custom", config.user, {})
        if template == "chat_template":
            if chat_template is None:
                raise ConfigError(
                    "data.dialogue.template is chat_template, but the model folder has none (chat_template.jinja); "
                    "use stoker, openvla or custom"
                )
            dialogue = cls("chat_template", chat_template, names, dict(config.template_options))
            dialogue.prompt("probe", 0, "")  # raises ConfigError for a template that does not work
            return dialogue
        return cls(template, TEMPLATES[template], {})

    @property
    def writes_bos(self) -> bool:
        """Whether the text has its own begin-of-sequence token, so that none is put before it."""
        return self.template == "chat_template"

    @property
    def images_after_bos(self) -> bool:
        """Whether images come right after the begin-of-sequence token, not in the text."""
        return self.template == "openvla"

    @property
    def answer_opening(self) -> str:
        """The text between the prompt and a text answer. Actions follow the prompt directly."""
        return " " if self.template in _SPACED else ""

    @property
    def takes_turns(self) -> bool:
        """Whether the template can write dialogues of several turns."""
        return self.template in ("stoker", "chat_template")

    @property
    def writes_reasoning(self) -> bool:
        """Whether the template knows reasoning that stands beside the content of a turn."""
        return self.template == "chat_template" and self.chat.takes_reasoning

    @property
    def openers(self) -> tuple[str, ...]:
        """Texts that open turns, which a turn's own text must not contain."""
        return (USER, ASSISTANT) if self.template == "stoker" else ()

    @cached_property
    def chat(self) -> ChatTemplate:
        return ChatTemplate(self.text, self.names, self.options)

    def prompt(self, instruction: str, num_images: int, image: str, state: str | None = None) -> str:
        """The text before the answer. image: the text for each image, "" where the caller places the images. Raises DataError."""
        if state is not None and self.template != "custom":
            instruction, state = STATE.replace("{state}", state).replace("{instruction}", instruction), None
        if self.template == "chat_template":
            return self.chat.prompt(instruction, num_images, image)
        if self.template == "openvla":
            instruction = instruction.lower()
        images = " ".join([image] * num_images) if image else ""
        text = self.text
        if images and "{image}" not in text:
            raise DataError(
                f"a sample has {num_images} images, but data.dialogue.user has no {{image}}: say where they go"
            )
        if not images:
            text = text.replace("{image} ", "").replace("{image}", "")
        if state is not None:
            text = text.replace("{state}", state)
        # Split, not replaced one after the other: an instruction may contain braces.
        return instruction.join(part.replace("{image}", images, 1) for part in text.split("{instruction}"))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        tree: dict[str, Any] = {"template": self.template, "text": self.text, "names": self.names}
        if self.template == "chat_template":
            tree["rules"] = CHAT_RULES
        # Left out where they change nothing, so that earlier runs go on.
        if self.options:
            tree["options"] = self.options
        if self.spoken:
            tree["spoken"] = list(self.spoken)
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The dialogue that `to_json` described."""
        return cls(
            str(tree["template"]),
            str(tree["text"]),
            {str(k): str(v) for k, v in tree["names"].items()},
            dict(tree.get("options", {})),
            tuple(map(str, tree.get("spoken", ()))),
        )


def resolved(config: DialogueConfig, chat_template: str | None, model_type: str) -> str:
    """The template that `auto` stands for; any other stands for itself."""
    if config.template != "auto":
        return config.template
    if model_type == "openvla":
        return "openvla"
    return "stoker" if chat_template is None else "chat_template"
