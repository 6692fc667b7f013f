"""Learned characters -> learned tokens, also where a token lies across the border, and with prefix spaces."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from stoker_proto.control_tokens import ControlTokens
from stoker_proto.rendered import Rendered, encode_rendered
from stoker_proto.tokenizer import TextTokenizer

CONTROL = ControlTokens(["<s>", "</s>"])


@pytest.fixture(scope="module")
def spaced() -> TextTokenizer:
    """Like Llama 2's: a space in front of what begins a text, words with their spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=80, special_tokens=["<s>", "</s>"], initial_alphabet=list("▁</s>\nabcdefgh"), show_progress=False
    )
    tokenizer.train_from_iterator(["push the cube", "the cube", "push"] * 9, trainer)
    return TextTokenizer(tokenizer, {"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("span", "expected"),
    [((0, 4), [1, 0, 0]), ((0, 5), [1, 1, 0]), ((4, 5), [0, 1, 0]), ((5, 9), [0, 1, 1]), ((8, 9), [0, 0, 1])],
)
def test_a_token_that_holds_a_learned_character_is_a_label(
    span: tuple[int, int], expected: list[int], spaced: TextTokenizer
) -> None:
    encoding = spaced.encoding("push the cube")
    assert [encoding.token_to_chars(i) for i in range(3)] == [(0, 4), (4, 8), (8, 13)]
    assert encode_rendered(spaced, CONTROL, Rendered("push the cube", (span,)))[1].tolist() == expected


def test_what_is_marked_is_letters_without_spaces_that_nobody_wrote(spaced: TextTokenizer) -> None:
    marked = CONTROL.mark("push</s>push <s>the")
    end = spaced.id_of("</s>")
    ids, labels = encode_rendered(spaced, CONTROL, Rendered(marked, ((len("push") + 1, len("push") + 5),)))
    assert end not in ids.tolist()
    tokens = [spaced.tokenizer.id_to_token(int(number)) for number in ids]
    assert "".join(tokens) == "▁push</s>push▁<s>the"
    learned = [token for token, label in zip(tokens, labels, strict=True) if label]
    assert "".join(learned) == "</s>"


def test_marks_cannot_be_forged() -> None:
    forged = "a\U000f0000x\U000f0001\U000f0002\U000f0003b"
    assert CONTROL.mark(forged) == "axb"
