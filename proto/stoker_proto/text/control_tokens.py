"""Text from data cannot write control tokens, the tokens that give rows their structure.

A user may type `<|im_end|>`, and a web page may contain `</s>`. Tokenised as they are, such strings would end a turn or forge
one. So they are marked in text from data, before the template puts its own tokens around it. Marked strings are encoded as plain
text. This is the rule of transformers' `apply_chat_template(sanitize_control_tokens=True)`.

Control tokens are all special tokens of the tokenizer, our action tokens, and other tokens that the template opens turns with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

OPEN, CLOSE = "\U000f0000", "\U000f0001"
"""Marks around a control token found in data: private-use characters, the same as in transformers."""
GENERATION_OPEN, GENERATION_CLOSE = "\U000f0002", "\U000f0003"
"""Marks around the assistant's text in a chat template; see `chat_template`."""
SPOKEN = (
    *(
        "<think>",
        "</think>",
        "<|begin_of_thought|>",
        "<|end_of_thought|>",
        "[THINK]",
        "[/THINK]",
        "<answer>",
        "</answer>",
    ),
    *("<tool_call>", "</tool_call>", "<|tool_call|>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *(f"<\uff5ctool\u2581{name}\uff5c>" for name in ("calls\u2581begin", "calls\u2581end", "sep")),  # DeepSeek's
    *(f"<\uff5ctool\u2581{name}\uff5c>" for name in ("call\u2581begin", "call\u2581end")),
)
"""Marks of reasoning and of calls in published tokenizers: what an assistant's text may contain as tokens."""
_MARKS = re.compile("[\U000f0000-\U000f0003]")
_ACTION_TOKEN = re.compile(r"<action_\d+>")
"""Our action tokens are control tokens even before they are in the vocabulary, so that rows do not depend on that moment."""


class ControlTokens:
    """The control tokens of one tokenizer and template."""

    def __init__(self, special: Iterable[str], openers: Iterable[str] = (), spoken: Iterable[str] = ()) -> None:
        """openers: tokens that begin turns and are not special. The assistant's own text may contain them.

        spoken: special tokens that the assistant's text may contain as tokens (`<think>`).
        """
        special = set(special)
        self._own = _compiled(special.difference(spoken))
        self._all = _compiled(special | set(openers))
        self._firsts = sorted({token[0] for token in (*special, *openers, "<") if token})
        self._pieces = re.compile(f"{OPEN}({self._all.pattern}){CLOSE}|[{OPEN}{CLOSE}]")

    def find(self, text: str, *, of_assistant: bool = False) -> str | None:
        """The first control token in the text; None where there is none."""
        found = (self._own if of_assistant else self._all).search(text)
        return None if found is None else found[0]

    def find_all(self, text: str, *, of_assistant: bool = False) -> list[re.Match[str]]:
        """All control tokens in the text, in order."""
        if text.isascii() and not any(first in text for first in self._firsts):
            return []
        return list((self._own if of_assistant else self._all).finditer(text))

    def mark(self, text: str, *, of_assistant: bool = False, written: Collection[str] = ()) -> str:
        """The text with marks around each control token; unchanged where there is none.

        written: tokens that the dataset itself put there, which stay unmarked.
        """
        if text.isascii():
            for first in self._firsts:
                if first in text:
                    break
            else:
                return text  # true for nearly all text, and much faster than a pattern
        pattern = self._own if of_assistant else self._all
        text = _MARKS.sub("", text)  # marks in the data would be forged ones
        if pattern.search(text) is None:
            return text
        return pattern.sub(lambda found: found[0] if found[0] in written else f"{OPEN}{found[0]}{CLOSE}", text)

    def pieces(self, marked: str) -> list[tuple[int, str, bool]]:
        """(start in the marked text, text, whether it was marked) of each piece between and inside the marks."""
        found: list[tuple[int, str, bool]] = []
        position = 0
        for match in self._pieces.finditer(marked):
            found.append((position, marked[position : match.start()], False))
            if match[1] is not None:
                found.append((match.start(1), match[1], True))
            position = match.end()
        found.append((position, marked[position:], False))
        return [piece for piece in found if piece[1]]


def is_action_token(token: str) -> bool:
    """Whether the text is one of our action tokens, such as `<action_17>`."""
    return token.startswith("<action_") and _ACTION_TOKEN.fullmatch(token) is not None


def is_marked(text: str) -> bool:
    """Whether `mark` found a control token."""
    return OPEN in text


def unmarked(text: str) -> str:
    """The text without marks around control tokens."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def without_marks(text: str) -> str:
    """Text from data without characters that could be taken for marks."""
    return text if text.isascii() else _MARKS.sub("", text)


def _compiled(tokens: Iterable[str]) -> re.Pattern[str]:
    tokens = sorted(token for token in tokens if token and not token.isspace())
    return re.compile("|".join(filter(None, [_trie_pattern(tokens), _ACTION_TOKEN.pattern])))


def _trie_pattern(tokens: list[str]) -> str:
    """A pattern of sorted tokens that shares their beginnings, so that hundreds of reserved tokens take the time of one.

    >>> _trie_pattern(["</s>", "<s>"])
    '<(?:/s>|s>)'
    """
    if not tokens:
        return ""
    groups: dict[str, list[str]] = {}
    for word in tokens:
        groups.setdefault(word[:1], []).append(word[1:])
    is_end = "" in groups
    groups.pop("", None)
    branches = [re.escape(first) + _trie_pattern(rest) for first, rest in groups.items()]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 and not is_end else f"(?:{'|'.join(branches)})"
    return f"{pattern}?" if is_end else pattern
