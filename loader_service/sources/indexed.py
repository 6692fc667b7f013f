"""Dataset classes in the way of torch: `__len__` and `__getitem__`, read through the interface of `base`.

    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "images": [uint8[H, W, 3]]}        what __getitem__ gives; or a Sample

A record is an index into one shard's items. Each shard has an instance of the class for itself, whose `files` is that shard.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from loader_service.sources.fields import OF_THE_FIRST, unread
from loader_service.sources.samples import Sample, ScannedRecord
from loader_service.sources.token_rows import FIELDS, IDS, token_row
from stoker_proto.config import DataConfig
from stoker_proto.errors import DataError, located
from stoker_proto.host.trouble import check_host

if TYPE_CHECKING:
    from loader_service.remote.store import RemoteStore

logger = logging.getLogger(__name__)

_LOOKED_AT = 16
"""Items of a shard that the scan looks at, for fields that are not read."""
_MAX_VIEWS = 64
"""Instances that a process keeps, one per shard; those used longest ago go first."""
_SOME = f"{OF_THE_FIRST}{_LOOKED_AT} items of each shard)"
_REFUSED = {
    "pixel_values": "pixels of the model: give `images`, uint8[H, W, 3] each; the loader makes the pixels",
    "image_grid_thw": "of pixels of the model: give `images`, uint8[H, W, 3] each",
    "inputs_embeds": "rows are token ids: give input_ids",
}
_IMAGES = "images"


class Indexed(Protocol):
    """What such a class has."""

    def __len__(self) -> int:
        """Number of items."""

    def __getitem__(self, index: int) -> Any:
        """An item: see above."""


class Dataset(Protocol):
    """What is used of a `BaseSFTDataset`."""

    config: DataConfig
    remote: RemoteStore | None
    files: tuple[Path, ...]

    def __init__(self, config: DataConfig) -> None:
        """See `BaseSFTDataset`."""

    @property
    def is_counted(self) -> bool:
        """See `BaseSFTDataset`."""


def is_indexed(cls: type) -> bool:
    """Whether the class has both methods."""
    return callable(getattr(cls, "__len__", None)) and callable(getattr(cls, "__getitem__", None))


class IndexedShards:
    """The instances of a class that belong to its shards; of one dataset object, for all its threads."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._views: OrderedDict[tuple[Path, int, int], Indexed] = OrderedDict()
        self._lock = threading.Lock()

    def scan(self, shard: Path) -> Iterator[ScannedRecord]:
        """One record and one sample for each index."""
        view = self._view(shard)
        first_notes = iter(()) if self._dataset.is_counted else _notes(view, shard)  # counting reads all
        for index in range(len(view)):
            yield ScannedRecord(offset=index, size=1, num_samples=1, notes=next(first_notes, ()))

    def read(self, shard: Path, index: int) -> Sample:
        """The sample of one index. Raises DataError."""
        view = self._view(shard)
        if index >= len(view):
            raise DataError(
                f"item {index} of {len(view)}: it changed since it was scanned; run loader-prepare again",
                file=str(shard),
            )
        return _sample(view, shard, index)

    def _view(self, shard: Path) -> Indexed:
        try:
            status = shard.stat()
        except OSError as error:
            check_host(error, str(shard))
            raise DataError(f"the shard cannot be read ({error.strerror})", file=str(shard)) from error
        key = shard, status.st_size, status.st_mtime_ns
        with self._lock:
            view = self._views.get(key)
            if view is None:
                view = self._views[key] = self._make(shard)
                if len(self._views) > _MAX_VIEWS:
                    self._views.popitem(last=False)
            self._views.move_to_end(key)
        return view

    def _make(self, shard: Path) -> Indexed:
        cls = type(self._dataset)
        config = replace(self._dataset.config, train_data_paths=(str(shard),), val_data_paths=())
        view = cls.__new__(cls)
        view.files = (shard,)  # before its own __init__, which may open them
        cls.__init__(view, config)
        view.remote = self._dataset.remote
        return cast(Indexed, view)


def _notes(view: Indexed, shard: Path) -> Iterator[tuple[str, ...]]:
    """Those of the first items. What an item fails with is told, or skipped, when it is read."""
    for index in range(min(len(view), _LOOKED_AT)):
        try:
            notes = _sample(view, shard, index).notes
        except DataError as error:
            logger.info("a bad item among the first: %s", error)
            notes = ()
        except Exception as error:  # the class is anybody's
            check_host(error, str(shard))
            logger.exception("dataset class %s failed on item %d of %s", type(view).__name__, index, shard)
            notes = ()
        yield tuple(f"{note}{_SOME}" for note in notes)


def _sample(view: Indexed, shard: Path, index: int) -> Sample:
    item = view[index]
    if isinstance(item, Sample):
        return item
    try:
        return _sample_of(item)
    except DataError as error:
        raise DataError(error.reason, file=str(shard), record=str(index), field=error.field) from error


def _sample_of(item: Any) -> Sample:
    if not isinstance(item, Mapping) or item.get(IDS) is None:
        shown = f"an object with {', '.join(map(str, item))}" if isinstance(item, Mapping) else type(item).__name__
        raise DataError(f"{shown}: {{input_ids, labels}} (and images), or a Sample, is expected of __getitem__")
    for name, reason in _REFUSED.items():
        if item.get(name) is not None:
            raise DataError(reason, field=name)
    ids, labels = token_row(item)
    return Sample(
        input_ids=ids,
        labels=ids if labels is None else labels,  # one row in any case
        images=tuple(_image(image, f"{_IMAGES}[{i}]") for i, image in enumerate(_list_of_images(item))),
        notes=unread({name: True for name in item if item[name] is not None}, (*FIELDS, _IMAGES)),
    )


def _list_of_images(item: Mapping[str, Any]) -> list[Any]:
    images = item.get(_IMAGES)
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        raise DataError(f"{type(images).__name__}: a list of images is expected", field=_IMAGES)
    return list(images)


def _image(image: Any, field: str) -> NDArray[np.uint8]:
    if hasattr(image, "convert"):  # Pillow's; its library is imported then
        from loader_service.sources.pictures import to_rgb

        with located(field=field):
            image = to_rgb(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(f"{pixels.dtype}{list(pixels.shape)}: uint8[H, W, 3] is expected", field=field)
    return pixels
