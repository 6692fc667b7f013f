"""Notes about text that is written differently than its author may have meant. loader-prepare counts them.

'<|im_end|>' in a turn of the user was written as text, not as the token
text that a chat template has written already (it holds '<|im_start|>assistant') is learned as letters: ...
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stoker_proto.text.control_tokens import ControlTokens
from stoker_proto.text.dialogue import ASSISTANT, Dialogue
from stoker_proto.text.turns import Turn

_OPENINGS = (
    *("<|im_start|>assistant", "<|start_header_id|>assistant<|end_header_id|>", "[/INST]", "<start_of_turn>model"),
    *("<|assistant|>", "<\uff5cAssistant\uff5c>", "<|start|>assistant", ASSISTANT),
)
"""How published chat templates open the assistant's turn."""
_WAY_OUT = "give its turns as messages, not the rendered text"


class TextNotes:
    """Looks at texts of one tokenizer and template."""

    def __init__(self, control: ControlTokens, dialogue: Dialogue) -> None:
        opening = _opening(dialogue, control)
        self._control, self._openings = control, (*_OPENINGS, *([opening] if opening else []))

    def of_turns(self, turns: Sequence[Turn]) -> list[str]:
        """Of a dialogue."""
        notes: dict[str, None] = {}
        for turn in turns:
            of_assistant = turn.role == "assistant"
            for text in filter(None, (turn.text, turn.reasoning)):
                for token in self._control.find_all(text, of_assistant=of_assistant):
                    notes[f"{token[0]!r} in a turn of the {turn.role} was written as text, not as the token"] = None
                notes.update(dict.fromkeys(self._rendered(text)))
        return list(notes)

    def of_text(self, text: str, written: Collection[str] = ()) -> list[str]:
        """Of plain text. written: tokens that the dataset itself put there."""
        tokens = dict.fromkeys(token[0] for token in self._control.find_all(text) if token[0] not in written)
        return [f"{token!r} was written as text, not as the token" for token in tokens] + self._rendered(text)

    def _rendered(self, text: str) -> list[str]:
        if "<" not in text and "[" not in text:
            return []
        found = next((opening for opening in self._openings if opening in text), None)
        if found is None:
            return []
        return [f"text that a chat template has written already (it holds {found!r}) is learned as letters: {_WAY_OUT}"]


def _opening(dialogue: Dialogue, control: ControlTokens) -> str:
    """How the model's template opens the assistant's turn after the user's; "" where no control token shows it."""
    if dialogue.template != "chat_template":
        return ""
    text = dialogue.chat.try_turns([Turn(role="user", text="q0zj"), Turn(role="assistant", text="q1zj")]) or ""
    opening = text.partition("q0zj")[2].partition("q1zj")[0].strip()
    return opening if control.find(opening) is not None else ""
