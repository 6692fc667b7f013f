"""Finds the characters that are learned in a dialogue that a chat template wrote.

A template with `{% generation %}` blocks marks them. For any other template: the text of the turns before, with the opening of an
assistant's turn, is the prompt that the model will see; the text with one more turn is what the model should have written. Both
must be beginnings of the whole text, or training would differ from use:

    whole    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user ...
    prompt   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    and turn <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    learned                                                         Hello<|im_end|>

White space at the end is not learned: it belongs to the next turn. A token that the template writes once, at the end of the whole
text (Phi-3), belongs to no turn before the last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property

from stoker_proto.errors import DataError, RowError
from stoker_proto.text.chat_frames import ChatFrames
from stoker_proto.text.chat_messages import Message
from stoker_proto.text.chat_original import Chat, ChatWriter
from stoker_proto.text.chat_template import ChatTemplate
from stoker_proto.text.control_tokens import GENERATION_CLOSE, GENERATION_OPEN, ControlTokens, unmarked
from stoker_proto.text.functions import Tools
from stoker_proto.text.rendered import Rendered
from stoker_proto.text.turns import Parts, Turn, is_plain

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
        self._template, self._control = template, control
        self.writer = ChatWriter(template, control, finish)
        self._frames: dict[tuple[tuple[str, bool], ...], ChatFrames | None] = {}

    def __call__(self, turns: Sequence[Turn], parts: Sequence[Parts], tools: Tools = ()) -> Rendered:
        """The whole text and its learned spans.

        Raises DataError where the template rejects the dialogue, RowError where the learned text cannot be found.
        """
        chat = self.writer.chat(turns, parts, tools)
        if self._template.marks_generation:
            return _by_blocks(self.writer.text(chat, len(turns), opening=False), turns)
        texts = [message["content"] for message in chat.messages]
        if (
            not tools
            and is_plain(turns)
            and all(isinstance(text, str) for text in texts)
            and (frames := self._frames_of(turns)) is not None
        ):
            found = frames.fit(self.writer.text(chat, len(turns), opening=False), texts)
            if found is not None:
                return found
        return self._by_beginnings(turns, chat)

    def _frames_of(self, turns: Sequence[Turn]) -> ChatFrames | None:
        key = tuple((turn.role, turn.learned) for turn in turns)
        if key not in self._frames:
            if len(self._frames) >= _MAX_FRAMES:
                self._frames.clear()
            said = [
                replace(turn, text=text) for turn, text in zip(turns, ChatFrames.placeholders(len(turns)), strict=True)
            ]
            chat = self.writer.chat(said, [(turn.text,) for turn in said], ())
            try:
                self._frames[key] = ChatFrames.of(self._by_beginnings(said, chat), len(said))
            except DataError:
                self._frames[key] = None  # rendering the dialogue itself will raise the error
        return self._frames.get(key)

    @cached_property
    def trailer(self) -> str:
        """Control tokens that the template writes once, behind a turn that has ended already; "" where there are none.

        Phi-3:   <|user|>\\nHi<|end|>\\n<|assistant|>\\nHello<|end|>\\n<|endoftext|>
        """
        said = [Turn(role="user", text="Hi"), Turn(role="assistant", text="Hello")]
        chat = self.writer.chat(said, [(turn.text,) for turn in said], ())
        try:
            closed, opened = (self.writer.text(chat, 2, opening=opening) for opening in (False, True))
        except DataError:
            return ""
        cut = next(
            (i for i, (a, b) in enumerate(zip(closed, opened, strict=False)) if a != b), min(len(closed), len(opened))
        )
        tokens = self._control.find_all(closed)
        cut = next((token.start() for token in tokens if token.start() < cut < token.end()), cut)
        behind = "".join(token[0] for token in tokens if token.start() >= cut)
        ends_before = any(token.end() == len(closed[:cut].rstrip()) for token in tokens)
        return closed[cut:] if ends_before and behind and behind == "".join(closed[cut:].split()) else ""

    def closed(self, chat: Chat, number: int) -> str:
        """The text of the first `number` turns, as it stands before a further turn."""
        return self.writer.text(chat, number, opening=False).removesuffix(self.trailer)

    def asked(self, chat: Chat, number: int) -> str:
        """The text of the first `number` turns, the last of which is the assistant's: the prompt as the model gets it, then the
        answer.

        Some templates write earlier turns differently once the answer is there. The result is then the prompt, and the text that
        follows the same last turn and opening where the answer is included. Raises DataError.
        """
        whole, prompt = self.writer.text(chat, number, opening=False), self.writer.text(chat, number - 1, opening=True)
        if number < 2 or whole.startswith(prompt):
            return whole
        last = _said(chat.messages[number - 2])
        start = max(prompt.rfind(last), prompt.rfind(_in_json(last))) if last else -1
        before, _, said = whole.rpartition(prompt[start:]) if start >= 0 else ("", "", "")
        return prompt + said if before else whole

    def _by_beginnings(self, turns: Sequence[Turn], chat: Chat) -> Rendered:
        number = len(turns)
        whole = self.asked(chat, number) if turns[-1].learned else self.writer.text(chat, number, opening=False)
        _check_whole(whole, chat.messages)
        spans = []
        for i, turn in enumerate(turns):
            if not turn.learned:
                continue
            prompt = self.writer.text(chat, i, opening=True)
            said = whole if i + 1 == len(turns) else self.closed(chat, i + 1)
            if not whole.startswith(said):
                raise RowError(
                    f"the model's chat template writes turns up to {i} otherwise where more follow (it rewrites history, e.g. "
                    f"strips reasoning), so what would be learned there is not what will be asked: {_WAY_OUT}"
                )
            if not whole.startswith(prompt):
                raise RowError(
                    f"the model's chat template opens turn {i} otherwise than generation would (add_generation_prompt), so what "
                    f"would be learned there is not what will be asked: {_WAY_OUT}; where the opening closes the reasoning "
                    "(enable_thinking: false), use data without reasoning"
                )
            start, end = len(prompt), len(said.rstrip())
            _check(whole[start:end], turn, chat.messages[i], i)
            head = whole[start : max(whole.find(_said(chat.messages[i])[:64], start, end), start)]
            if self._control.find(head) is not None and prompt == self.writer.text(chat, i, opening=False):
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


def _in_json(text: str) -> str:
    """The text as it stands in JSON: some templates write the results of tools so."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _check_whole(whole: str, messages: Sequence[Message]) -> None:
    """Check that no turn of another role than the assistant's is left out. Raises RowError."""
    packed = ""
    for number, message in enumerate(messages):
        content = message["content"]
        for said in [content] if isinstance(content, str) else [part.get("text", "") for part in content]:
            said = said.strip()
            if message["role"] == "assistant" or said in whole or _in_json(said) in whole:
                continue
            packed = packed or "".join(whole.split())
            if "".join(said.split()) in packed:
                continue
            raise RowError(
                f"the model's chat template leaves out turn {number}, which is the {message['role']}'s ({said[:60]!r}): take "
                "such turns out of the data, or use another template"
            )


def _check(learned: str, turn: Turn, message: Message, number: int) -> None:
    """Check that the learned text contains what the turn says, apart from white space. Raises RowError."""
    reasoning = message.get("reasoning_content", "")
    learned = unmarked(learned)
    for said in (_said(message), reasoning.strip(), *(call.name for call in turn.calls)):
        said = unmarked(said)
        if not learned or (said not in learned and "".join(said.split()) not in "".join(learned.split())):
            raise RowError(
                f"the model's chat template changes what turn {number} says ({learned[:60]!r} for {said[:60]!r}): write the "
                f"turn as the template does, or {_WAY_OUT}"
            )
