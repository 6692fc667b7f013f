"""A served folder, and stores over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp  # noqa: F401  (early, as it takes longer than the deadlines of some tests)
import fsspec.implementations.http  # noqa: F401
import pytest

from loader_service.remote import eviction
from loader_service.remote.store import RemoteStore
from stoker_proto.config.remote import RemoteConfig
from tests.loader_service.remote.http_files import HttpFiles, http_files


@pytest.fixture
def served(tmp_path: Path) -> Iterator[HttpFiles]:
    """`data/` of the test's folder: a.bin of 1000 bytes, b.bin of 1000 others, sub/c.bin of 500."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"a" * 1000)
    (folder / "b.bin").write_bytes(b"b" * 1000)
    (folder / "sub" / "c.bin").write_bytes(b"c" * 500)
    with http_files(folder) as files:
        yield files


@pytest.fixture
def make_store(tmp_path: Path, served: HttpFiles) -> Callable[..., RemoteStore]:
    """A store of the served folder's files with these keys of `data.remote`; all of them share one cache folder."""
    eviction._told.clear()

    def make(*urls: str, **keys: Any) -> RemoteStore:
        store = RemoteStore(tmp_path / "cache" / "remote", RemoteConfig(**{"min_free_gb": 0, "deadline_s": 5, **keys}))
        store.cover(urls or (served.url_of(),))
        return store

    return make
