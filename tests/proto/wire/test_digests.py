"""What a row's digest is: pinned, because runs of different versions are compared by it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash

from stoker_proto import run_record
from stoker_proto.errors import DataError
from stoker_proto.run_record import FOLDER, FORMAT, RunRecord
from stoker_proto.wire import digests
from stoker_proto.wire.digests import digests_of_rows
from stoker_proto.wire.messages import Piece

PIECE = Piece(
    ticket=1,
    loader="a",
    keys=np.array([[0, 3, 5], [1, 4, 6]]),
    lengths=np.array([2, 1], np.int32),
    input_ids=np.array([7, 8, 9], np.int32),
    supervised=np.array([0, 1, 1], np.uint8),
    image_counts=np.array([1, 2], np.uint8),
    images=[b"left", b"right", bytes(1 << 16)],
    actions=np.array([[[0.5, 1.0]], [[2.0, 3.0]]], np.float32),
    auxiliary=np.array([[0.25], [4.0]], np.float32),
)


def numbers(*values: int) -> bytes:
    return np.array(values, "<i8").tobytes()


def test_a_digest_is_the_hash_of_all_that_a_row_is_and_of_a_hash_of_its_large_images() -> None:
    first = [
        *(numbers(0, 3, 5), numbers(2, 1, 2, 1)),  # key; tokens, timesteps, dimensions, images
        *(np.array([7, 8], "<i4").tobytes(), b"\0\1", np.array([0.5, 1.0], "<f4").tobytes()),
        *(np.array([0.25], "<f4").tobytes(), numbers(4), b"left"),
    ]
    second = [
        *(numbers(1, 4, 6), numbers(1, 1, 2, 2)),
        *(np.array([9], "<i4").tobytes(), b"\1", np.array([2.0, 3.0], "<f4").tobytes()),
        *(np.array([4.0], "<f4").tobytes(), numbers(5), b"right"),
        *(numbers(1 << 16), xxhash.xxh3_128_digest(bytes(1 << 16))),
    ]
    expected = [hashlib.sha256(b"".join(row)).digest() for row in (first, second)]
    assert digests_of_rows(PIECE) == expected
    packed = dataclasses.replace(PIECE, row_samples=np.array([2], np.uint16))
    assert digests_of_rows(packed) == [hashlib.sha256(b"".join(expected)).digest()]
    views = dataclasses.replace(PIECE, images=[memoryview(image) for image in PIECE.images])
    assert digests_of_rows(views) == expected
    assert digests_of_rows(PIECE)[0].hex()[:16] == "e59e47913fb692f3"
    before = hashlib.sha256(b"".join([*second[:-1], bytes(1 << 16)])).digest()
    assert digests_of_rows(PIECE, rule=1) == [expected[0], before], "runs that were recorded before are made again"


def test_a_host_without_xxhash_uses_the_rule_that_needs_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As where packages are copied to a host that reaches no index."""
    by_rule_1 = digests_of_rows(PIECE, rule=1)
    monkeypatch.setitem(sys.modules, "xxhash", None)
    spec = importlib.util.spec_from_file_location("digests_there", digests.__file__)
    assert spec is not None
    assert spec.loader is not None
    there = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(there)
    assert there.RULE == 1
    assert there.digests_of_rows(PIECE, there.RULE) == by_rule_1
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "a.json").write_text(json.dumps({"format": FORMAT, "digest_rule": 2}))
    monkeypatch.setattr(run_record, "RULE", there.RULE)
    with pytest.raises(DataError, match="digest_rule 2 needs the package xxhash: pip install xxhash"):
        RunRecord.read(tmp_path, "a")
