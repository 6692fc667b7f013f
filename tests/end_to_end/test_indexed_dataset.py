"""A class with `__len__` and `__getitem__`, in a module outside the repository, through loader-prepare and real loaders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end.fleet import ROOT, Loader, pull, run_program, serving, write_config
from tests.tiny_models import TINY_IMAGE_TOKEN_ID, write_model_folder

pytestmark = pytest.mark.process

MODULE = '''
"""Rows as any program leaves them; written as the README says, with nothing of Stoker but the base class."""

import json

import numpy as np

from loader_service.sources.base import BaseSFTDataset


class Rows(BaseSFTDataset):
    def __init__(self, config):
        super().__init__(config)
        self.rows = [json.loads(line) for file in self.files for line in file.read_text().splitlines()]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = dict(self.rows[index])
        if row.pop("broken", False):
            raise KeyError("no answer")
        if "grey" in row:
            row["images"] = [np.full((40, 30, 3), row.pop("grey"), np.uint8)]
        return row
'''

COUNTS = (37, 20)
LENGTHS = np.random.default_rng(0).integers(3, 40, sum(COUNTS)).tolist()
KEYS = sorted([(0, i, 0) for i in range(COUNTS[0])] + [(1, i, 0) for i in range(COUNTS[1])])
"""(entry, record, sample)."""


def row_of(number: int) -> dict[str, Any]:
    """Ids 10, 11, ...; the second half is learned; the first id is the row's own."""
    ids = [10 + number, *range(300, 300 + LENGTHS[number] - 1)]
    half = len(ids) // 2
    return {"input_ids": ids, "labels": [-100] * half + ids[half:], "source": "test"}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "my_rows.py").write_text(MODULE)
    return folder


@contextmanager
def loader_of(config: Path, package: Path, *arguments: str) -> Iterator[Loader]:
    path = os.pathsep.join(map(str, (package, ROOT, ROOT / "proto")))
    with serving(config, *arguments, PYTHONPATH=path) as loader:
        yield loader


def write_rows(folder: Path, rows: Sequence[Sequence[dict[str, Any]]]) -> list[Path]:
    shards = []
    for number, of_shard in enumerate(rows):
        shards.append(folder / f"{number}.jsonl")
        shards[-1].write_text("".join(json.dumps(row) + "\n" for row in of_shard))
    return shards


def make_config(folder: Path, **data: Any) -> Path:
    model = write_model_folder(folder / "model", "causal")
    rows = [[row_of(i) for i in range(COUNTS[0])], [row_of(COUNTS[0] + i) for i in range(COUNTS[1])]]
    return write_config(
        folder, model, write_rows(folder, rows), dataset_type="my_rows:Rows",
        **{"max_seq_len": 64, "order": {"lanes": 4, "cell": 3, "window_records": 8}, **data},
    )  # fmt: skip


@pytest.mark.parametrize("packing", [False, True])
def test_every_item_comes_once_whoever_serves_and_a_resume_goes_on(
    packing: bool, tmp_path: Path, package: Path
) -> None:
    order = {"lanes": 4, "cell": 3, "window_rows" if packing else "window_records": 12}
    config = make_config(tmp_path, packing=packing, order=order)
    with loader_of(config, package) as one:
        expected = pull(config, [one.address])
        rest = pull(config, [one.address], first_sample=8)
        again = pull(config, [one.address], epoch=1)
    with loader_of(config, package, "--set", "loader.workers=2") as a, loader_of(config, package) as b:
        several = pull(config, [a.address, b.address], ranks=2)
    assert sorted(expected.keys) == sorted(again.keys) == KEYS
    assert expected.keys != again.keys
    assert (several.keys, several.rows, several.steps) == (expected.keys, expected.rows, expected.steps)
    assert rest.steps == expected.steps[1:]
    assert (max(expected.rows) > 1) is packing


def test_only_labels_are_learned(tmp_path: Path, package: Path) -> None:
    config = make_config(tmp_path)
    found = {}
    with loader_of(config, package) as loader:
        for micro in _micro_batches(config, loader):
            for row in range(micro.num_rows):
                length = int(micro.attention_mask[row].sum())
                found[int(micro.input_ids[row, 0])] = (
                    micro.input_ids[row, :length].tolist(),
                    micro.labels[row, :length].tolist(),
                )
    assert len(found) == sum(COUNTS)
    for number in range(sum(COUNTS)):
        assert found[10 + number] == (row_of(number)["input_ids"], row_of(number)["labels"])


def test_images_travel_with_their_rows(tmp_path: Path, package: Path) -> None:
    model = write_model_folder(tmp_path / "model")
    image = TINY_IMAGE_TOKEN_ID
    rows = [{"input_ids": [5, image, 7, 8], "labels": [-100, -100, -100, 8], "grey": 20 * i} for i in range(1, 9)]
    config = write_config(tmp_path, model, write_rows(tmp_path, [rows]), dataset_type="my_rows:Rows")
    greys = []
    with loader_of(config, package) as loader:
        for micro in _micro_batches(config, loader):
            assert micro.image_counts[: micro.num_rows].tolist() == [1] * micro.num_rows
            assert (micro.input_ids[: micro.num_rows] == image).sum(axis=1).tolist() == [16] * micro.num_rows
            greys += [round(float(np.mean(pixels))) for pixels in micro.pixels[: micro.num_rows]]
    assert np.abs(np.array(sorted(greys)) - np.arange(20, 180, 20)).max() <= 2, greys


def test_a_broken_item_keeps_its_place_or_ends_the_run(tmp_path: Path, package: Path) -> None:
    config = make_config(tmp_path, on_bad_sample="skip")
    lines = (tmp_path / "0.jsonl").read_text().splitlines()
    lines[5] = json.dumps({"broken": True})
    (tmp_path / "0.jsonl").write_text("\n".join(lines) + "\n")
    with loader_of(config, package) as loader:
        found = pull(config, [loader.address])
    assert sorted(found.keys) == KEYS
    (why,) = found.skipped
    assert "0.jsonl" in why
    assert "record 5" in why
    assert "KeyError: 'no answer'" in why


def test_prepare_counts_rows_and_names_fields_that_are_not_read(tmp_path: Path, package: Path) -> None:
    config = make_config(tmp_path, packing=True)
    path = os.pathsep.join(map(str, (package, ROOT, ROOT / "proto")))
    done = run_program("loader_service.cli", "prepare", "--config", str(config), "--verify", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert "train 0: 37 records: not read: field 'source'" in done.stdout
    assert "train 1: 20 records: not read: field 'source'" in done.stdout
    assert "verified: every record was read" in done.stdout


def _micro_batches(config: Path, loader: Loader) -> list[Any]:
    from stoker_proto.config.reader import load_config
    from trainer.feed.feed import Feed

    loaded = load_config(config, [f"cluster.loader_addresses=[{loader.address}]"])
    with Feed(loaded, "train", 0, 1) as feed:
        feed.connect()
        return [micro for step in feed.steps(0, 0) for micro in step.micro_batches]
