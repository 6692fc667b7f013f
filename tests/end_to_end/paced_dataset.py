"""Questions whose reading takes as long as a variable says: a loader with a slow disk, beside others with quick ones."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from loader_service.sources.base import Sample
from tests.end_to_end.text_dataset import Questions

READ_S = "STOKER_TEST_READ_S"


class Paced(Questions):
    """One sample a record."""

    is_text = False

    def read(self, shard: Path, offset: int, size: int) -> Iterator[Sample]:
        """Its sample, after a while."""
        time.sleep(float(os.environ.get(READ_S, "0")))
        yield from super().read(shard, offset, size)
