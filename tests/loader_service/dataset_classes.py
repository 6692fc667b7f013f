"""Dataset classes for tests. Of language: JSONL whose lines are lists of samples.

[{"text": "x = 1"}, {"input_ids": [5, 6]}, {"turns": [["user", "Hi", false], ["assistant", "Hello", true]]}]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loader_service.sources.base import BaseSFTDataset, Sample, ScannedRecord, Turn
from loader_service.sources.jsonl import cut_lines, iter_lines, read_line
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.config import DataConfig
from stoker_proto.errors import DataError


class Language(BaseSFTDataset):
    """Its rows and tokens are counted by loader-prepare."""

    is_text = True

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        return self.scan_part(shard, 0, shard.stat().st_size)

    def cut(self, shard: Path, part_bytes: int) -> list[int]:
        return cut_lines(shard, part_bytes)

    def scan_part(self, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        for offset, line in iter_lines(shard, start, stop):
            yield ScannedRecord(offset=offset, size=len(line), num_samples=line.count(b"{"))

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        for item in json.loads(read_line(shard, offset, size)):
            if "bad" in item:
                raise DataError(f"bad: {item['bad']}")
            if "state" in item:
                state = np.array(item["state"], np.float32)
                yield Sample(instruction=item["instruction"], answer=item["answer"], state=state)
            elif "turns" in item:
                yield Sample(turns=tuple(Turn(role=r, text=t, learned=learned) for r, t, learned in item["turns"]))
            elif "input_ids" in item:
                yield Sample(input_ids=np.array(item["input_ids"], np.int32))
            else:
                yield Sample(text=item["text"])


class Dialogues(Language):
    """Each sample is one row."""

    one_row_each = True


class States(Language):
    """Instructions with states."""

    is_text = False

    def scan_part(self, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        for record in super().scan_part(shard, start, stop):
            states = [item["state"] for item in json.loads(read_line(shard, record.offset, record.size))]
            yield ScannedRecord(
                offset=record.offset,
                size=record.size,
                num_samples=record.num_samples,
                states=np.array(states, np.float32),
            )


class Wrong(ManiOpenPIDataset):
    """The first record's second sample has another type or shape than promised; `options.wrong` says which."""

    def __init__(self, config: DataConfig) -> None:
        self.what = config.options["wrong"]
        super().__init__(replace(config, options={}))

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        for number, sample in enumerate(super().read(shard, offset, size)):
            assert sample.action is not None
            yield self._wrong(sample, sample.action) if offset == 0 and number == 1 else sample

    def _wrong(self, sample: Sample, action: np.ndarray) -> Any:
        if self.what == "raises":
            return 1 // 0
        nan = np.where(np.arange(action.shape[1]) == 2, np.float32("nan"), action)
        values: dict[str, dict[str, Any]] = {
            "uneven": {"action": action[:, :3]},
            "nan": {"action": nan},
            "text": {"action": [["a"] * 7]},
            "flat": {"action": action[0]},
            "words": {"instruction": b"go"},
            "frames": {"images": ([[[0, 0, 0]]],)},
        }
        return {"instruction": "go"} if self.what == "dict" else replace(sample, **values[self.what])


class Hanging(ManiOpenPIDataset):
    """Every read hangs in the kernel once there is a pipe at `options.pipe`; a file beside it says that one does."""

    def __init__(self, config: DataConfig) -> None:
        self.pipe = Path(config.options["pipe"])
        super().__init__(replace(config, options={}))

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        if self.pipe.exists():
            self.pipe.with_suffix(".opened").touch()
            self.pipe.open().close()  # until somebody opens the other end
        yield from super().read(shard, offset, size)


class TooLarge(ManiOpenPIDataset):
    """The first record's second sample has what no field of a piece holds; `options.too_large` says what."""

    def __init__(self, config: DataConfig) -> None:
        self.what = config.options["too_large"]
        super().__init__(replace(config, options={}))

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        for number, sample in enumerate(super().read(shard, offset, size)):
            if offset != 0 or number != 1:
                yield sample
            elif self.what == "images":
                yield replace(sample, images=sample.images * 256)
            elif self.what == "timestep":
                yield replace(sample, timestep=1 << 63)
            elif self.what == "fraction":
                yield replace(sample, timestep=0.5)  # type: ignore[arg-type]
            else:
                yield replace(sample, action=np.zeros((1, 4097), np.float32))


class Wrapping(ManiOpenPIDataset):
    """Calls everything that it cannot read bad data, as a class of one's own may."""

    def scan_part(self, shard: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        with self._all_bad(shard):
            yield from super().scan_part(shard, start, stop)

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        with self._all_bad(shard):
            yield from super().read(shard, offset, size)

    @contextmanager
    def _all_bad(self, shard: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise DataError("it cannot be read", file=str(shard)) from error
