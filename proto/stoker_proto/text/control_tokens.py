"""What a text says is text: the tokens that give rows their structure cannot be written by it.

A user may type `<|im_end|>`, a web page hold `</s>`. Tokenised as it stands this would end a turn, or forge one. So such
strings are marked in what comes from data, before the template puts its own tokens around it, and what is marked is encoded as
plain text: the rule of transformers' `apply_chat_template(sanitize_control_tokens=True)`.

Control tokens are all special tokens of the tokenizer, our action tokens, and those others that the template opens turns with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

OPEN, CLOSE = "\U000f0000", "\U000f0001"
"""Around a control token that stands in data. Private-use characters, and transformers' own choice."""
GENERATION_OPEN, GENERATION_CLOSE = "\U000f0002", "\U000f0003"
"""Around what a chat template says is the assistant's; see `chat_template`."""
_MARKS = re.compile("[\U000f0000-\U000f0003]")
_ACTION_TOKEN = re.compile(r"<action_\d+>")
"""Ours, also where they are not in the vocabulary (yet): a row must not depend on when it was written."""


class ControlTokens:
    """The control tokens of one tokenizer and template."""

    def __init__(self, special: Iterable[str], openers: Iterable[str] = ()) -> None:
        """openers: what turns begin with beside special tokens; the assistant's own words may hold them (`<think>`)."""
        special = set(special)
        self._own = _compiled(special)
        self._all = _compiled(special | set(openers))
        self._firsts = sorted({token[0] for token in (*special, *openers, "<") if token})
        self._pieces = re.compile(f"{OPEN}({self._all.pattern}){CLOSE}|[{OPEN}{CLOSE}]")

    def find(self, text: str) -> str | None:
        """The first control token that stands in the text."""
        found = self._all.search(text)
        return None if found is None else found[0]

    def mark(self, text: str, *, of_assistant: bool = False, written: Collection[str] = ()) -> str:
        """The text with marks around each; unchanged where there is none.

        written: tokens that the dataset itself put there, and that are meant.
        """
        if text.isascii():
            for first in self._firsts:
                if first in text:
                    break
            else:
                return text  # nearly all text; much faster than a pattern
        pattern = self._own if of_assistant else self._all
        text = _MARKS.sub("", text)  # else they could be forged, too
        if pattern.search(text) is None:
            return text
        return pattern.sub(lambda found: found[0] if found[0] in written else f"{OPEN}{found[0]}{CLOSE}", text)

    def pieces(self, marked: str) -> list[tuple[int, str, bool]]:
        """(where it begins in the marked text, text, whether it is plain) of what lies between and inside the marks."""
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
    """Whether `mark` found something."""
    return OPEN in text


def _compiled(tokens: Iterable[str]) -> re.Pattern[str]:
    tokens = sorted(token for token in tokens if token and not token.isspace())
    return re.compile("|".join(filter(None, [_trie_pattern(tokens), _ACTION_TOKEN.pattern])))


def _trie_pattern(tokens: list[str]) -> str:
    """A pattern of sorted tokens that shares their beginnings: hundreds of reserved tokens cost what one does.

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
