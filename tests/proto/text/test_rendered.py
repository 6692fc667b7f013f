"""Learned characters -> learned tokens, also where a token lies across the border, and with prefix spaces."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from stoker_proto.errors import DataError
from stoker_proto.text.control_tokens import ControlTokens
from stoker_proto.text.rendered import Labelled, Rendered, TextJob, encode_all, run_together
from stoker_proto.text.tokenizer import TextTokenizer

CONTROL = ControlTokens(["<s>", "</s>"])


def labelled(tokenizer: TextTokenizer, rendered: Rendered) -> Labelled:
    """Of one text."""
    [found] = encode_all(tokenizer, CONTROL, [rendered])
    assert not isinstance(found, DataError)
    return found


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
    assert labelled(spaced, Rendered("push the cube", (span,)))[1].tolist() == expected


def test_what_is_marked_is_letters_without_spaces_that_nobody_wrote(spaced: TextTokenizer) -> None:
    marked = CONTROL.mark("push</s>push <s>the")
    end = spaced.id_of("</s>")
    ids, labels = labelled(spaced, Rendered(marked, ((len("push") + 1, len("push") + 5),)))
    assert end not in ids.tolist()
    tokens = [spaced.tokenizer.id_to_token(int(number)) for number in ids]
    assert "".join(tokens) == "▁push</s>push▁<s>the"
    learned = [token for token, label in zip(tokens, labels, strict=True) if label]
    assert "".join(learned) == "</s>"


def test_marks_cannot_be_forged() -> None:
    forged = "a\U000f0000x\U000f0001\U000f0002\U000f0003b"
    assert CONTROL.mark(forged) == "axb"


def test_a_text_that_is_learned_whole_is_learned_with_its_first_space(spaced: TextTokenizer) -> None:
    alone = Rendered(" cube", ((0, 5),))
    ids, labels = labelled(spaced, alone)
    assert labels.tolist() == [1] * len(ids)


def test_jobs_get_their_own_answers_and_their_own_errors(spaced: TextTokenizer) -> None:
    """Some ask twice, some for nothing, one for what cannot be written; all as if each were alone."""
    control = ControlTokens(["<s>", "</s>"], ["<|User|>"])

    def job(*rounds: list[str]) -> TextJob[list[list[int]]]:
        found = []
        for texts in rounds:
            answers = yield [Rendered(control.mark(text)) for text in texts]
            found += [ids.tolist() for ids, _ in answers]
        return found

    def failing() -> TextJob[list[list[int]]]:
        yield [Rendered("push")]
        raise DataError("too long")

    def alone(text: str) -> list[int]:
        return labelled(spaced, Rendered(CONTROL.mark(text)))[0].tolist()

    jobs = [job(["push", "the </s> cube"], ["cube"]), failing(), job(), job(["<|User|>"], ["push"]), job([], ["the"])]
    first, second, third, fourth, fifth = run_together(spaced, control, jobs)
    assert first == [alone("push"), alone("the </s> cube"), alone("cube")]
    assert isinstance(second, DataError)
    assert str(second) == "too long"
    assert third == []
    assert isinstance(fourth, DataError)
    assert "the text holds '<|User|>'" in str(fourth)
    assert fifth == [alone("the")]
