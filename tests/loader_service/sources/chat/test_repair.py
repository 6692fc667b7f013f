"""Broken dialogues: five rules, each counted once per record, and what they cannot mend."""

from __future__ import annotations

import pytest

from loader_service.sources.chat.message import Message
from loader_service.sources.chat.repair import EARLY, EMPTY, MERGED, TRAILING, mend
from stoker_proto.errors import DataError
from stoker_proto.text.turns import Call

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


def messages(text: str) -> list[Message]:
    """ "u:hi a:yes" -> a user's turn and one of the assistant; _ is no words."""
    pairs = [word.split(":") for word in text.split()]
    return [Message(ROLES[role], words.replace("_", "  ")) for role, words in pairs]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "notes"),
    [
        ("u:1 a:2", "u:1 a:2", ()),
        ("s:0 u:1 a:2 u:3 a:4", "s:0 u:1 a:2 u:3 a:4", ()),
        ("u:1 a:2 t:3 a:4", "u:1 a:2 t:3 a:4", ()),
        ("u:1 a:2 t:3 t:4 a:5", "u:1 a:2 t:3 t:4 a:5", ()),
        ("u:1 a:2 u:3", "u:1 a:2", (TRAILING,)),
        ("u:1 a:2 u:3 u:4", "u:1 a:2", (MERGED, TRAILING)),
        ("u:1 a:2 t:3", "u:1 a:2", (TRAILING,)),
        ("u:1 u:2 a:3", "u:1++2 a:3", (MERGED,)),
        ("u:1 u:2 u:3 a:4 a:5", "u:1++2++3 a:4++5", (MERGED,)),
        ("a:0 u:1 a:2", "u:1 a:2", (EARLY,)),
        ("s:0 a:0 t:0 u:1 a:2", "s:0 u:1 a:2", (EARLY,)),
        ("u:1 a:_ u:2 a:3", "u:1++2 a:3", (EMPTY, MERGED)),
        ("s:_ u:1 a:2", "u:1 a:2", (EMPTY,)),
        ("u:1 a:2 u:_", "u:1 a:2", (EMPTY,)),
        ("a:0 u:_ u:1 a:2 u:3 u:4 a:_", "u:1 a:2", (EMPTY, EARLY, MERGED, TRAILING)),
    ],
)
def test_the_rules(before: str, after: str, notes: tuple[str, ...]) -> None:
    found, said = mend(messages(before))
    assert " ".join(f"{message.role[0]}:{message.text}" for message in found) == after.replace("++", "\n\n")
    assert said == notes


@pytest.mark.parametrize("text", ["u:1", "a:1", "s:0", "u:1 a:_", "a:1 u:2", "u:_ a:1", "s:0 a:1", "u:1 t:2", "u:_"])
def test_nothing_to_learn_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match=r"no words of the assistant after a user's turn .* nothing can be learned"):
        mend(messages(text))


def test_turns_that_are_learned_differently_are_not_merged() -> None:
    one, two = Message("assistant", "x", learned=True), Message("assistant", "y", learned=False)
    found, notes = mend([Message("user", "u"), one, two])
    assert ([message.text for message in found], notes) == (["u", "x", "y"], ())


def test_a_function_that_returns_nothing_has_answered() -> None:
    """Without its turn the model would learn to go on right behind its call."""
    calling = Message("assistant", "", calls=(Call("open", {}), Call("close", {})))
    said = [Message("user", "u"), calling, Message("tool", ""), Message("tool", " "), Message("assistant", "done")]
    found, notes = mend(said)
    assert ([message.role for message in found], notes) == (["user", "assistant", "tool", "tool", "assistant"], ())
    found, notes = mend([*said[:1], Message("assistant", "x"), *said[2:]])
    assert ([message.role for message in found], notes) == (["user", "assistant"], (EMPTY, MERGED))


def test_merged_turns_keep_their_images_in_order() -> None:
    first, second = Message("user", "<image>", images=("a",)), Message("user", "<image>", images=("b",))
    found, _ = mend([first, second, Message("assistant", "x")])
    assert found[0].images == ("a", "b")
