"""Token ids with labels beside them, from tables to rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.pieces.encoder import RecordEncoder
from loader_service.prepare.run import prepare
from loader_service.sources.token_rows import token_row
from stoker_proto.errors import DataError, RowError
from stoker_proto.processor import Processor
from tests.tiny_models import TINY_IMAGE_TOKEN_ID, make_config, write_model_folder

ROW = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]}


@pytest.mark.parametrize(
    ("row", "ids", "labels"),
    [
        (ROW, [5, 6, 7, 8, 9], [-100, -100, -100, 8, 9]),
        ({"input_ids": [5, 6, 7]}, [5, 6, 7], None),
        ({"input_ids": [5, 6, 7], "labels": None}, [5, 6, 7], None),
        ({"input_ids": [5, 6, 7], "completion_mask": [0, 0, 1]}, [5, 6, 7], [-100, -100, 7]),
        ({"input_ids": [5, 6, 7], "assistant_masks": [False, True, True]}, [5, 6, 7], [-100, 6, 7]),
        ({"input_ids": np.array([5, 6, 7]), "loss_mask": np.array([0, 1, 1])}, [5, 6, 7], [-100, 6, 7]),
        ({**ROW, "attention_mask": [1, 1, 1, 1, 1]}, [5, 6, 7, 8, 9], [-100, -100, -100, 8, 9]),
        (
            {"input_ids": [5, 8, 0, 0], "labels": [-100, 8, -100, -100], "attention_mask": [1, 1, 0, 0]},
            [5, 8],
            [-100, 8],
        ),
        ({"input_ids": [0, 5, 8], "attention_mask": [0, 1, 1]}, [5, 8], None),
    ],
)
def test_what_is_said_of_tokens_is_read(row: dict[str, Any], ids: list[int], labels: list[int] | None) -> None:
    found, learned = token_row(row)
    assert found.dtype == np.int32
    assert found.tolist() == ids
    assert (None if learned is None else learned.tolist()) == labels


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [5, 6], "labels": [-100]}, "field labels: 1 numbers for 2 token ids: as many are expected"),
        ({"input_ids": [5, 6], "labels": "x"}, "field labels: shape [] and type <U1: whole numbers [T]"),
        ({"input_ids": [5, 6], "labels": [0.5, 6]}, "field labels: a list with something else than whole numbers"),
        ({"input_ids": [5, 6], "loss_mask": [0, 2]}, "field loss_mask: 2: 0 or 1 for each token"),
        ({**ROW, "loss_mask": [1] * 5}, "field loss_mask: it says something else than the labels"),
        ({"input_ids": [5, 6], "attention_mask": [0, 0]}, "field attention_mask: all 0"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "field attention_mask: 0 between two 1"),
        ({"input_ids": [[5, 6]]}, "a list with something else than whole numbers"),
        ({"input_ids": np.ones((1, 2), np.int64)}, "shape [1, 2] and type int64"),
        ({"input_ids": [1 << 70]}, "token ids are expected"),
    ],
)
def test_what_cannot_be_honoured_is_refused(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        token_row(row)
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"), "causal")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.zst"])
@pytest.mark.parametrize("packing", [False, True])
def test_only_labels_are_labels(name: str, packing: bool, model: Path, write_table: Callable[..., Path]) -> None:
    """No option is needed, and the ids are one unchanged row."""
    shard = write_table(name, [ROW, {**ROW, "labels": [5, 6, 7, 8, 9]}, {"input_ids": [5, 6, 7], "labels": None}])
    config = make_config(
        model, "data.dataset_type=text", f"data.train_data_paths=[{shard}]", f"data.packing={str(packing).lower()}"
    )
    entry = prepare(config).entries["train"][0]
    assert entry.num_tokens.tolist() == [5, 5, 3]
    encoder = RecordEncoder(config.data, Processor.build(config, None))
    rows = [encoder.encode(entry, record, 0).samples for record in range(3)]
    assert [(row.input_ids.tolist(), row.supervised.tolist()) for [row] in rows] == [
        ([5, 6, 7, 8, 9], [0, 0, 0, 1, 1]),
        ([5, 6, 7, 8, 9], [0, 1, 1, 1, 1]),
        ([5, 6, 7], [0, 1, 1]),
    ]


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((6, 7, -100), r"label 0 is 6, and input_ids have 5 there: .* shifted back"),
        ((-100, -100, -100), r"none of the 3 tokens is learned"),
        ((5, -100, -100), r"none of the 3 tokens is learned"),
        ((-100, 7), r"labels of shape \[2\] and type int32 for 3 input_ids"),
    ],
)
def test_labels_that_say_nothing_or_something_else_are_refused(
    labels: tuple[int, ...], message: str, model: Path
) -> None:
    processor = Processor.build(make_config(model), None)
    with pytest.raises(DataError, match=message):
        processor.encode_labelled(ids(5, 6, 7), ids(*labels))


def test_a_row_that_is_too_long_is_refused_or_cut(model: Path) -> None:
    given = ids(5, 6, 7, 8), ids(-100, 6, 7, 8)
    with pytest.raises(RowError, match=r"need 4 tokens, but data\.max_seq_len is 3: raise it, or set data\.overlong"):
        Processor.build(make_config(model, max_seq_len=3), None).encode_labelled(*given)
    config = make_config(model, "data.overlong=truncate", max_seq_len=3)
    row = Processor.build(config, None).encode_labelled(*given)
    assert (row.input_ids.tolist(), row.supervised.tolist()) == ([5, 6, 7], [0, 1, 1])
    with pytest.raises(DataError, match="none of the 3 tokens is learned"):
        Processor.build(config, None).encode_labelled(ids(5, 6, 7, 8), ids(-100, -100, -100, 8))


def test_images_stand_at_their_tokens(tmp_path: Path) -> None:
    processor = Processor.build(make_config(write_model_folder(tmp_path)), None)
    assert processor.image is not None
    num_tokens, image = processor.image.num_tokens, TINY_IMAGE_TOKEN_ID
    once = processor.encode_labelled(ids(5, image, 7), ids(-100, image, 7), 1)
    assert once.input_ids.tolist() == [5, *[image] * num_tokens, 7]
    assert once.supervised.tolist() == [0] * (num_tokens + 1) + [1]
    repeated = processor.encode_labelled(once.input_ids, once.input_ids, 1)
    assert repeated.input_ids.tolist() == once.input_ids.tolist()
    assert repeated.supervised.tolist() == once.supervised.tolist()
    with pytest.raises(DataError, match=rf"hold '<image>' 1 times for 2 images: 2 times .* or {2 * num_tokens} times"):
        processor.encode_labelled(ids(5, image, 7), ids(-100, -100, 7), 2)
