"""Labels found by the bytes of tokens are those that the tokenizer's own offsets give."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from stoker_proto.text.rendered import Rendered
from stoker_proto.text.token_bytes import TokenBytes
from stoker_proto.text.tokenizer import TextTokenizer, int32_array
from tests.proto.text.test_rendered import labelled

TEXTS = (
    "push the cube</s>push the plate",
    "Der Würfel fällt — «déjà vu», 机器人把方块推到目标。</s> 🤖 the end",
    "  x = [1, 2]\n\n\treturn  12 </s>\n",
)


def byte_level(**changes: object) -> TextTokenizer:
    """Trained on a few words, so that most others are bytes; changes: attributes of the tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["push the cube", "the plate", "fällt", "\n\n  return"] * 9, trainer)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return TextTokenizer(tokenizer, {"eos_token": "</s>"})


def by_offsets(tokenizer: TextTokenizer, text: str, start: int, end: int) -> list[int]:
    """The definition: every token of which a character is in [start, end)."""
    offsets = tokenizer.encoding(text).offsets
    return [int(max(a, start) < min(b, end)) for a, b in offsets]


@pytest.mark.long
@pytest.mark.parametrize("text", TEXTS)
def test_labels_are_those_of_the_offsets(text: str) -> None:
    tokenizer, generator = byte_level(), random.Random(7)
    assert tokenizer.token_bytes.are_known
    for _ in range(200):
        start, end = sorted(generator.sample(range(len(text) + 1), 2))
        ids, labels = labelled(tokenizer, Rendered(text, ((start, end),)))
        assert ids.tolist() == tokenizer.encode(text)
        assert labels.tolist() == by_offsets(tokenizer, text, start, end), (start, end)


def test_a_token_of_white_space_is_learned_where_a_post_processor_trims_the_offsets() -> None:
    trimming = byte_level(post_processor=processors.ByteLevel(trim_offsets=True))
    text = "push\n\n 12"
    assert trimming.encoding(text).offsets[2][0] == trimming.encoding(text).offsets[2][1]  # said to hold nothing
    _, labels = labelled(trimming, Rendered(text, ((len("push"), len(text)),)))
    assert labels.tolist() == [0, *[1] * (len(labels) - 1)]


def test_offsets_are_asked_for_where_a_normaliser_changes_the_text() -> None:
    composing = byte_level(normalizer=normalizers.NFC())
    text = "push fa\u0308llt the cube"  # one letter of two characters, which become one
    start = text.index("the")
    ids = int32_array(composing.encode(text))
    assert composing.token_bytes.are_known
    assert composing.token_bytes.ends(ids, text) is None
    _, labels = labelled(composing, Rendered(text, ((start, len(text)),)))
    assert labels.tolist() == by_offsets(composing, text, start, len(text))
    assert 0 < labels.sum() < len(labels)


def test_added_tokens_stand_for_their_content() -> None:
    tokenizer = byte_level()
    tokenizer.tokenizer.add_tokens(["<äction>"])
    known = TokenBytes(tokenizer.tokenizer)
    text = "the <äction> cube"
    ends = known.ends(int32_array(tokenizer.encode(text)), text)
    assert ends is not None
    assert ends[-1] == len(text.encode())
    assert len("the <äction>".encode()) in ends


def test_sentence_pieces_are_not_taken_for_bytes() -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=60, initial_alphabet=list("▁abcdefgh"), show_progress=False)
    tokenizer.train_from_iterator(["push the cube"] * 9, trainer)
    assert not TokenBytes(tokenizer).are_known


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    tokenizer = byte_level()
    text = "push 机 the🤖</s>"
    ids = tokenizer.encode(text)
    texts = tokenizer.texts_of(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text
    assert texts.count("") == 2 + 3
    cut = tokenizer.encode("机")[:2] + tokenizer.encode("the")
    assert tokenizer.texts_of(cut)[-1] == "the"
    assert "" not in tokenizer.texts_of(cut)
