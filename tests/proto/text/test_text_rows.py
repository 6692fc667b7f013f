"""Plain text as rows: cut, labelled, counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.errors import ConfigError, DataError, RowError
from stoker_proto.processor import Processor
from tests.proto.conftest import words
from tests.tiny_models import make_config, write_model_folder

TEXTS = [
    "", "a", "Push the red cube", "x = 1\n" * 40, "an </s> in HTML, <s>struck</s>", "<image>", "🤖" * 7,
    "<action_3> and <action_x>",
    " " * 50, "Würfel机器人" * 9,
]  # fmt: skip

SEVEN = "zqzxjvk"
"""Seven tokens."""


def build(folder: Path, max_seq_len: int, family: str = "causal") -> Processor:
    write_model_folder(folder, family)
    return Processor.build(make_config(folder, max_seq_len=max_seq_len), None)


def test_rows_by_hand(tmp_path: Path) -> None:
    processor = build(tmp_path, 4)
    ids = processor._tokenizer.encode(SEVEN)
    assert len(ids) == 7
    rows = processor.texts.of_text(SEVEN)
    assert [row.input_ids.tolist() for row in rows] == [[0, *ids[:3]], [0, *ids[3:6]], [0, ids[6], 1]]
    assert [row.supervised.tolist() for row in rows] == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1]]
    assert rows[0].input_ids.dtype == np.int32
    given = processor.texts.of_ids(np.array([0, *ids, 1]))
    assert [row.input_ids.tolist() for row in given] == [row.input_ids.tolist() for row in rows]


@pytest.mark.parametrize(
    ("ids", "rows"),
    [
        ([0, 5, 6, 7, 8, 9, 1], [[0, 5, 6, 7], [0, 8, 9, 1]]),  # a text as the tokenizer writes it
        ([0, 5, 6, 7], [[0, 5, 6, 7]]),  # the beginning of one
        ([5, 6, 7, 8], [[5, 6, 7, 8]]),  # of a stream: nothing is put in front or behind
        ([5, 6, 7, 8, 9, 1], [[5, 6, 7, 8], [8, 9, 1]]),
        ([6, 1, 0, 5], [[6, 1, 0, 5]]),
        ([5], []),
        ([0], []),
        ([0, 1], []),
        ([1], []),
    ],
)
def test_ids_are_taken_as_they_are(ids: list[int], rows: list[list[int]], tmp_path: Path) -> None:
    texts = build(tmp_path, 4).texts
    found = texts.of_ids(np.array(ids, np.uint16))
    assert [row.input_ids.tolist() for row in found] == rows
    assert all(row.supervised.tolist() == [0] + [1] * (len(row.input_ids) - 1) for row in found)


@pytest.mark.parametrize("max_seq_len", [2, 3, 7, 64, 4096])
@pytest.mark.parametrize("family", ["causal", "llava"])
def test_counts_are_those_of_the_rows_and_every_token_is_a_label_once(
    max_seq_len: int, family: str, tmp_path: Path
) -> None:
    processor = build(tmp_path, max_seq_len, family)
    counts = processor.texts.count_texts([(text, ()) for text in TEXTS])
    for text, count in zip(TEXTS, counts, strict=True):
        rows = processor.texts.of_text(text)
        assert count == (len(rows), sum(len(row.input_ids) for row in rows))
        assert processor.texts.count_texts([(text, ())]) == [count]
        assert all(len(row.input_ids) <= max_seq_len for row in rows)
        learned = np.concatenate([row.input_ids[row.supervised == 1] for row in rows] or [np.zeros(0)])
        if text:
            assert words(processor, learned) == text + "</s>"
            assert (learned == processor.end_id).sum() == 1
            assert processor.image_token_id not in learned.tolist()
        else:
            assert rows == []


@pytest.mark.parametrize("max_seq_len", [2, 3, 4, 5, 8, 9])
def test_without_a_begin_of_sequence_rows_overlap_by_one_token(max_seq_len: int, tmp_path: Path) -> None:
    write_model_folder(tmp_path, "causal")
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    texts = Processor.build(make_config(tmp_path, max_seq_len=max_seq_len), None).texts
    for text in (*TEXTS, SEVEN):
        rows = texts.of_text(text)
        assert texts.count_texts([(text, ())]) == [(len(rows), sum(len(row.input_ids) for row in rows))]
        assert all(2 <= len(row.input_ids) <= max_seq_len for row in rows)
        assert all(row.supervised.tolist() == [0] + [1] * (len(row.input_ids) - 1) for row in rows)
    if max_seq_len == 4:
        ids = [*texts._tokenizer.encode(SEVEN), 1]
        assert [row.input_ids.tolist() for row in rows] == [ids[0:4], ids[3:7], ids[6:8]]


def test_counts_of_other_rows_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = build(tmp_path, 4)
    before = processor.text_fingerprint
    monkeypatch.setattr("stoker_proto.processor.ROWS_VERSION", 0)
    assert processor.text_fingerprint != before


def test_action_tokens_that_were_added_change_no_text(tmp_path: Path) -> None:
    """The scan counts before a codec is fitted: rows must be the same with its tokens in the vocabulary."""
    processor = build(tmp_path, 16)
    before = [row.input_ids.tolist() for row in processor.texts.of_text("<action_3> is no action")]
    processor._tokenizer.add_actions("added", 16)
    assert [row.input_ids.tolist() for row in processor.texts.of_text("<action_3> is no action")] == before


def test_ids_that_are_none(tmp_path: Path) -> None:
    texts = build(tmp_path, 16).texts
    with pytest.raises(DataError, match=r"input_ids hold 1027: the tokenizer has ids 0-1026"):
        texts.of_ids(np.array([5, 1027]))
    with pytest.raises(DataError, match=r"input_ids hold -1"):
        texts.of_ids(np.array([-1]))
    with pytest.raises(DataError, match=r"whole numbers \[T\] are expected"):
        texts.of_ids(np.array([[1.0]]))
    assert texts.of_ids(np.array([], np.int64)) == []
    with pytest.raises(ConfigError, match=r"data.max_seq_len is 1: no token of a text fits"):
        build(tmp_path, 1).texts.of_text("a")


def test_special_tokens_that_a_dataset_wrote_are_tokens(tmp_path: Path) -> None:
    texts = build(tmp_path, 64).texts
    end, pad = 1, 2
    [row] = texts.of_text("<pad>x</s>y<pad>", ("<pad>",))
    assert (row.input_ids == pad).sum() == 2
    assert (row.input_ids == end).sum() == 1  # the row's own
    assert texts.count_texts([("<pad>x</s>y<pad>", ("<pad>",))]) == [(1, len(row.input_ids))]
    assert (texts.of_text("<pad>x")[0].input_ids == pad).sum() == 0


def test_a_special_token_that_the_tokenizer_lacks_is_no_word(tmp_path: Path) -> None:
    texts = build(tmp_path, 64).texts
    reason = r"writes '<fim_prefix>', which is no token .*data\.options\.tokens"
    with pytest.raises(RowError, match=reason):
        texts.of_text("<fim_prefix>x", ["<fim_prefix>"])
    count, fine = texts.count_texts([("<fim_prefix>x", ["<fim_prefix>"]), ("x", ())])
    assert isinstance(count, RowError)
    assert re.search(reason, str(count))
    assert fine == (1, 3)
