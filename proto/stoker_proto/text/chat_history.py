"""Which answers of a dialogue share a row, where a chat template rewrites history.

Qwen 3, DeepSeek, gpt-oss and others leave out earlier reasoning, Mistral writes the system text into the last user turn. So an
earlier answer stands in the whole text otherwise than the model was asked for it. Each such answer has a row of its own: the
dialogue up to it, as it would be asked. Answers that a row shows exactly as they would be asked are learned in that row too.

    dialogue  user, answer 1, user, answer 2
    rows      user, answer 1                           answer 1 is learned
              user, answer 1 rewritten, user, answer 2     answer 2 is learned
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from stoker_proto.errors import DataError
from stoker_proto.text.chat_spans import DialogueRenderer
from stoker_proto.text.chat_template import ChatTemplate
from stoker_proto.text.functions import Tools
from stoker_proto.text.turns import Call, Parts, Turn

_TOOL = {"type": "function", "function": {"name": "probe", "description": "probe", "parameters": {"type": "object"}}}


class ChatHistory:
    """Divides dialogues for one template."""

    def __init__(self, template: ChatTemplate, renderer: DialogueRenderer) -> None:
        self._template, self._renderer = template, renderer

    @cached_property
    def is_rewritten(self) -> bool:
        """Whether the template rewrites the history of a usual dialogue, so that a dialogue may need several rows.

        Templates with `{% generation %}` blocks do not: their author has marked the answers of the whole text.
        """
        return not self._template.marks_generation and any(self._needs_rows(*probe) for probe in self._probes())

    def divide(self, turns: Sequence[Turn], parts: Sequence[Parts], tools: Tools) -> list[list[Turn]]:
        """The beginnings of the dialogue that are rows, each with the learned turns of that row. Raises DataError."""
        chat = self._renderer.writer.chat(turns, parts, tools)
        waiting = [number for number, turn in enumerate(turns) if turn.learned]
        rows: list[list[Turn]] = []
        while waiting:
            stop = waiting[-1] + 1
            whole = self._renderer.asked(chat, stop)
            shown = {
                number
                for number in waiting
                if number + 1 == stop
                or (
                    whole.startswith(self._renderer.closed(chat, number + 1))
                    and whole.startswith(self._renderer.writer.text(chat, number, opening=True))
                )
            }
            rows.append([replace(turn, learned=number in shown) for number, turn in enumerate(turns[:stop])])
            waiting = [number for number in waiting if number not in shown]
        return rows[::-1]

    def _needs_rows(self, turns: Sequence[Turn], tools: Tools) -> bool:
        try:
            return len(self.divide(turns, [(turn.text,) for turn in turns], tools)) > 1
        except DataError:  # the template takes no such dialogue
            return False

    def _probes(self) -> list[tuple[list[Turn], Tools]]:
        """Dialogues of two answers: plain, with a system turn, with reasoning, with functions."""
        user, answer = Turn(role="user", text="Hi"), Turn(role="assistant", text="Hello", learned=True)
        plain = [user, answer, user, answer]
        inline = replace(answer, text="<think>\nhm\n</think>\n\nHello")
        probes: list[tuple[list[Turn], Tools]] = [
            (plain, ()),
            ([Turn(role="system", text="Be kind."), *plain], ()),
            ([user, inline, user, inline], ()),
        ]
        thinking = replace(answer, reasoning="hm") if self._template.takes_reasoning else answer
        probes.append(([user, thinking, user, thinking], ()))
        if self._template.call_form is not None:
            probes.append((plain, [_TOOL]))
            call = replace(thinking, text="", calls=(Call("probe", {"key": "value"}),))
            used = [user, call, Turn(role="tool", text="done"), thinking]
            probes.append(([*used, *used], [_TOOL]))
        return probes
