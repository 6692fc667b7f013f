"""Items of `__getitem__` -> samples; what cannot be honoured is refused with file, item and field."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loader_service.sources.base import BaseSFTDataset, Sample, make_dataset
from loader_service.sources.indexed import _MAX_VIEWS
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, DataError

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
made_for: list[tuple[Path, ...]] = []


class Items(BaseSFTDataset):
    """Each shard is Python: a list of items."""

    shard_patterns = ("*.py",)

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        made_for.append(self.files)
        names = {"np": np, "PIXELS": PIXELS, "Image": Image, "Sample": Sample}
        self.items = [item for file in self.files for item in eval(file.read_text(), names)]  # noqa: S307 - this test's own

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class Neither(BaseSFTDataset):
    """Without any of the four methods."""


class OnlyScan(BaseSFTDataset):
    """Without `read`."""

    def scan(self, shard: Path) -> Any:
        raise AssertionError


def dataset_of(shard: Path, name: str = "Items") -> BaseSFTDataset:
    config = DataConfig(dataset_type=f"{__name__}:{name}", train_data_paths=(str(shard),), max_seq_len=64)
    return make_dataset(config)


def read(tmp_path: Path, items: str) -> Sample:
    shard = tmp_path / "a.py"
    shard.write_text(items)
    dataset = dataset_of(shard)
    [record] = dataset.scan(shard)
    [sample] = dataset.read(shard, record.offset, record.size)
    return sample


@pytest.mark.parametrize(
    "item",
    [
        "{'input_ids': [5, 6, 7], 'labels': [-100, 6, 7]}",
        "{'input_ids': np.array([5, 6, 7]), 'labels': np.array([-100, 6, 7]), 'images': None}",
        "{'input_ids': (5, 6, 7), 'labels': (-100, 6, 7), 'attention_mask': [1, 1, 1]}",
        "Sample(input_ids=np.array([5, 6, 7], np.int32), labels=np.array([-100, 6, 7], np.int32))",
    ],
)
def test_items_are_samples(item: str, tmp_path: Path) -> None:
    sample = read(tmp_path, f"[{item}]")
    assert sample.input_ids is not None
    assert sample.labels is not None
    assert (sample.input_ids.tolist(), sample.labels.tolist()) == ([5, 6, 7], [-100, 6, 7])
    assert (sample.images, sample.notes) == ((), ())


def test_without_labels_every_token_is_learned_in_one_row(tmp_path: Path) -> None:
    sample = read(tmp_path, "[{'input_ids': [5, 6, 7]}]")
    assert sample.labels is not None
    assert sample.labels.tolist() == [5, 6, 7]


def test_images_may_be_arrays_or_pictures(tmp_path: Path) -> None:
    sample = read(tmp_path, "[{'input_ids': [5, 6], 'images': [PIXELS, Image.fromarray(PIXELS).convert('RGBA')]}]")
    assert [image.tolist() for image in sample.images] == [PIXELS.tolist()] * 2


def test_pictures_are_the_right_way_up_and_deep_grey_is_refused(tmp_path: Path) -> None:
    """As those of chats: Pillow's own `convert` would make white of depth, and leave a turned photo lying."""
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(PIXELS).save(tmp_path / "turned.png", exif=exif)
    opened = f"Image.open({str(tmp_path / 'turned.png')!r})"
    [image] = read(tmp_path, f"[{{'input_ids': [5, 6], 'images': [{opened}]}}]").images
    assert image.tolist() == PIXELS[::-1, ::-1].tolist()
    deep = "[{'input_ids': [5, 6], 'images': [Image.fromarray(np.full((2, 4), 300, np.uint16))]}]"
    with pytest.raises(DataError, match=r"field images\[0\]: grey of more than 8 bits \(mode I;16\)"):
        read(tmp_path, deep)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("[5, 6]", "record 0: list: {input_ids, labels} (and images), or a Sample, is expected of __getitem__"),
        ("{'text': 'Hi'}", "record 0: an object with text: {input_ids, labels}"),
        (
            "{'input_ids': [5], 'pixel_values': [0.5]}",
            "record 0, field pixel_values: pixels of the model: give `images`",
        ),
        (
            "{'input_ids': [5], 'images': [PIXELS / 255]}",
            "field images[0]: float64[2, 4, 3]: uint8[H, W, 3] is expected",
        ),
        ("{'input_ids': [5], 'images': PIXELS}", "field images: ndarray: a list of images is expected"),
        ("{'input_ids': [5, 6], 'labels': [5]}", "field labels: 1 numbers for 2 token ids"),
    ],
)
def test_what_is_no_item_is_refused(item: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, f"[{item}]")
    assert str(tmp_path / "a.py") in str(caught.value)
    assert message in str(caught.value)


def test_fields_that_are_not_read_are_noted(tmp_path: Path) -> None:
    shard = tmp_path / "a.py"
    shard.write_text("[{'input_ids': [5, 6], 'token_type_ids': np.zeros(2), 'weight': None}] * 40")
    records = list(dataset_of(shard).scan(shard))
    noted = ("not read: field 'token_type_ids' (of the first 16 items of each shard)",)
    assert [record.notes for record in records] == [noted] * 16 + [()] * 24


def test_one_instance_belongs_to_each_shard_and_few_are_kept(tmp_path: Path) -> None:
    shards = [tmp_path / f"{i}.py" for i in range(_MAX_VIEWS + 1)]
    for number, shard in enumerate(shards):
        shard.write_text(f"[{{'input_ids': [{number}, 1]}}]")
    made_for.clear()
    dataset = dataset_of(tmp_path)
    for _ in range(2):
        for number, shard in enumerate(shards):
            [sample] = dataset.read(shard, 0, 1)
            assert sample.input_ids is not None
            assert sample.input_ids[0] == number
    assert made_for == [(), *[(shard,) for shard in shards] * 2], "more shards than are kept, each opened anew"
    made_for.clear()
    for _ in range(3):
        assert list(dataset.read(shards[-1], 0, 1))
    assert made_for == []
    shards[-1].write_text("[]                      ")
    with pytest.raises(DataError, match="item 0 of 0: it changed since it was scanned"):
        list(dataset.read(shards[-1], 0, 1))


@pytest.mark.parametrize("name", ["Neither", "OnlyScan"])
def test_a_class_without_these_methods_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf":{name}': the class needs scan and read, or __len__ and __getitem__"):
        dataset_of(tmp_path, name)


def test_the_class_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parents[3] / "loader_service" / "sources" / "README.md").read_text()
    [block] = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "def __getitem__" in block]
    (tmp_path / "readme_rows.py").write_text(block)
    monkeypatch.syspath_prepend(str(tmp_path))
    shard = tmp_path / "a.jsonl"
    shard.write_text('{"ids": [5, 6, 7], "labels": [-100, 6, 7]}\n{"ids": [8, 9], "labels": [-100, 9]}\n')
    config = DataConfig(dataset_type="readme_rows:Rows", train_data_paths=(str(tmp_path),), max_seq_len=64)
    dataset = make_dataset(config)
    assert dataset.locate(str(tmp_path)).paths == (shard.resolve(),)
    samples = [sample for record in dataset.scan(shard) for sample in dataset.read(shard, record.offset, record.size)]
    assert [sample.input_ids.tolist() for sample in samples if sample.input_ids is not None] == [[5, 6, 7], [8, 9]]
    assert [sample.labels.tolist() for sample in samples if sample.labels is not None] == [[-100, 6, 7], [-100, 9]]
