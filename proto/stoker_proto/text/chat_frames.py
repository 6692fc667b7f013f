"""The text that a chat template writes around the turns' own text, cached per sequence of roles.

    roles     user, assistant (learned), user
    frames    <|im_start|>user\\n | <|im_end|>\\n<|im_start|>assistant\\n | <|im_end|>\\n<|im_start|>user\\n | <|im_end|>\\n
    learned                                                     from here   up to here

Rendering every beginning of every dialogue takes longer than tokenising it. So this is done once per sequence of roles, for a
dialogue of placeholders. If a dialogue's text consists of the same frames around its own turns (unchanged or stripped), its
labels are in the same places. Any other dialogue is rendered in full: see `chat_spans`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from stoker_proto.text.rendered import Rendered

_PLACEHOLDER = "q{}zj"  # means nothing to any template
_PLACEHOLDERS = re.compile(r"q(\d+)zj")

Place = tuple[int, int]
"""(index of a frame, character in it)."""


@dataclass(frozen=True, slots=True)
class ChatFrames:
    """The frames of one sequence of roles, for N turns."""

    frames: tuple[str, ...]  # N + 1
    spans: tuple[tuple[Place, Place], ...]
    """[start, end) of each learned part."""

    @staticmethod
    def placeholders(num_turns: int) -> list[str]:
        """The texts of the dialogue of placeholders."""
        return [_PLACEHOLDER.format(i) for i in range(num_turns)]

    @classmethod
    def of(cls, rendered: Rendered, num_turns: int) -> Self | None:
        """From the rendered dialogue of placeholders. None where the template did not write each placeholder once, in order."""
        found = list(_PLACEHOLDERS.finditer(rendered.text))
        if [int(match[1]) for match in found] != list(range(num_turns)):
            return None
        starts = [0, *(match.end() for match in found)]
        stops = [*(match.start() for match in found), len(rendered.text)]
        spans = []
        for start, end in rendered.spans:
            places = [
                next(((k, at - a) for k, (a, b) in enumerate(zip(starts, stops, strict=True)) if a <= at <= b), None)
                for at in (start, end)
            ]
            if places[0] is None or places[1] is None or places[1][1] == 0:  # there is no token that ends the turn
                return None
            spans.append((places[0], places[1]))
        return cls(tuple(rendered.text[a:b] for a, b in zip(starts, stops, strict=True)), tuple(spans))

    def fit(self, whole: str, texts: Sequence[str]) -> Rendered | None:
        """The learned spans of `whole`, the rendered text of turns with these texts. None where the frames do not fit."""
        for said in (texts, [text.strip() for text in texts]):
            pieces = [*itertools.chain.from_iterable(zip(self.frames, said, strict=False)), self.frames[-1]]
            if "".join(pieces) == whole:
                starts = list(itertools.accumulate(map(len, pieces), initial=0))[::2]  # of the frames
                return Rendered(whole, tuple((starts[k] + a, starts[m] + b) for (k, a), (m, b) in self.spans))
        return None
