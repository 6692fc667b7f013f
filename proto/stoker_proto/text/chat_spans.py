"""Finds the characters that are learned in a dialogue that a chat template wrote.

A template with `{% generation %}` blocks marks them. For any other template: the text of the turns before, with the opening of an
assistant's turn, is the prompt that the model will see; the text with one more turn is what the model should have written. Both
must be beginnings of the whole text, or training would differ from use:

    whole    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user ...
    prompt   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    and turn <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    learned                                                         Hello<|im_end|>

White space at the end is not learned: it belongs to the next turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from stoker_proto.errors import DataError, RowError
from stoker_proto.text.chat_frames import ChatFrames
from stoker_proto.text.chat_template import ChatTemplate, Message
from stoker_proto.text.control_tokens import GENERATION_CLOSE, GENERATION_OPEN, ControlTokens
from stoker_proto.text.rendered import Rendered
from stoker_proto.text.turns import Parts, Turn

_MAX_FRAMES = 1024  # most cached sequences of roles
_BLOCK = re.compile(f"{GENERATION_OPEN}|{GENERATION_CLOSE}")
_WAY_OUT = (
    "learn the last turn only, or give the model's chat_template.jinja {% generation %} ... {% endgeneration %} around what the "
    "assistant says"
)


class DialogueRenderer:
    """Renders dialogues with one template, and finds what is learned."""

    def __init__(self, template: ChatTemplate, control: ControlTokens, finish: Callable[[str], str]) -> None:
        """finish: applied to every rendered text; it writes what the model has around images."""
        self._template, self._control, self._finish = template, control, finish
        self._frames: dict[tuple[tuple[str, bool], ...], ChatFrames | None] = {}

    def __call__(self, turns: Sequence[Turn], parts: Sequence[Parts]) -> Rendered:
        """The whole text and its learned spans.

        Raises DataError where the template rejects the dialogue, RowError where the learned text cannot be found.
        """
        messages = self._template.messages(turns, parts, self._control)
        if self._template.marks_generation:
            return _by_blocks(self._finish(self._template.render(messages, opening=False)), turns)
        texts = [message["content"] for message in messages]
        is_plain = all(isinstance(text, str) for text in texts) and not any(turn.reasoning for turn in turns)
        if is_plain and (frames := self._frames_of(turns)) is not None:
            found = frames.fit(self._finish(self._template.render(messages, opening=False)), texts)
            if found is not None:
                return found
        return self._by_beginnings(turns, messages)

    def _frames_of(self, turns: Sequence[Turn]) -> ChatFrames | None:
        key = tuple((turn.role, turn.learned) for turn in turns)
        if key not in self._frames:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            said = [
                replace(turn, text=text) for turn, text in zip(turns, ChatFrames.placeholders(len(turns)), strict=True)
            ]
            messages = self._template.messages(said, [(turn.text,) for turn in said], self._control)
            try:
                self._frames[key] = ChatFrames.of(self._by_beginnings(said, messages), len(said))
            except DataError:
                self._frames[key] = None  # rendering the dialogue itself will raise the error
        return self._frames.get(key)

    def _by_beginnings(self, turns: Sequence[Turn], messages: Sequence[Message]) -> Rendered:
        def render(number: int, opening: bool) -> str:
            return self._finish(self._template.render(messages[:number], opening=opening))

        whole = render(len(messages), False)
        spans = []
        for i, turn in enumerate(turns):
            if not turn.learned:
                continue
            prompt = render(i, True)
            said = whole if i + 1 == len(turns) else render(i + 1, False)
            if not whole.startswith(said):
                raise RowError(
                    f"the model's chat template writes turns up to {i} otherwise where more follow (it rewrites history, e.g. "
                    f"strips reasoning), so what would be learned there is not what will be asked: {_WAY_OUT}"
                )
            if not whole.startswith(prompt):
                raise RowError(
                    f"the model's chat template opens turn {i} otherwise than generation would (add_generation_prompt), so what "
                    f"would be learned there is not what will be asked: {_WAY_OUT}"
                )
            start, end = len(prompt), len(said.rstrip())
            _check(whole[start:end], messages[i], i)
            head = whole[start : max(whole.find(_said(messages[i])[:64], start, end), start)]
            if self._control.find(head) is not None and prompt == render(i, False):
                raise RowError(
                    f"the model's chat template has no opening of the assistant's turn (add_generation_prompt): {head!r} would "
                    "be learned. Add it to chat_template.jinja"
                )
            spans.append((start, end))
        return Rendered(whole, tuple(spans))


def _by_blocks(marked: str, turns: Sequence[Turn]) -> Rendered:
    """The template's own blocks: the n-th block is the n-th turn of the assistant."""
    if not any(turn.learned for turn in turns):  # no label depends on a block
        return Rendered(_BLOCK.sub("", marked))
    pieces, spans, start = [], [], -1
    position = before = 0
    for match in _BLOCK.finditer(marked):
        pieces.append(marked[before : match.start()])
        position += match.start() - before
        before = match.end()
        if (match[0] == GENERATION_OPEN) != (start < 0):
            raise RowError(
                "the {% generation %} blocks of the model's chat template stand inside each other: " + _WAY_OUT
            )
        if start < 0:
            start = position
        else:
            spans.append((start, position))
            start = -1
    learned = [turn.learned for turn in turns if turn.role == "assistant"]
    if not all(learned):
        if len(spans) != len(learned):
            raise RowError(
                f"the model's chat template wrote {len(spans)} {{% generation %}} blocks for {len(learned)} turns of the "
                "assistant's, so those that are not learned cannot be told from those that are: one block each is expected"
            )
        spans = [span for span, wanted in zip(spans, learned, strict=True) if wanted]
    spans = [(a, b) for a, b in spans if a < b]
    if not spans:
        raise RowError("the model's chat template wrote no {% generation %} block that is learned: " + _WAY_OUT)
    return Rendered("".join([*pieces, marked[before:]]), tuple(spans))


def _said(message: Message) -> str:
    content = message["content"]
    text: str = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
    return text.strip()


def _check(learned: str, message: Message, number: int) -> None:
    """Check that the learned text contains the turn's text, apart from white space. Raises RowError."""
    said = _said(message)
    if not learned or (said not in learned and "".join(said.split()) not in "".join(learned.split())):
        raise RowError(
            f"the model's chat template changes what turn {number} says ({learned[:60]!r} for {said[:60]!r}): write the turn as "
            f"the template does, or {_WAY_OUT}"
        )
