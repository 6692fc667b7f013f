"""The `RemoteStore` of a process, shared by all datasets of the same config."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from loader_service.remote.url import is_url
from stoker_proto.config import DataConfig
from stoker_proto.config.reader import config_to_tree
from stoker_proto.errors import ConfigError
from stoker_proto.hashing import fingerprint

if TYPE_CHECKING:
    from loader_service.remote.store import RemoteStore

_stores: dict[str, RemoteStore] = {}
_lock = threading.Lock()


def remote_store(data: DataConfig) -> RemoteStore | None:
    """The store; None if the config names no URL. Raises ConfigError."""
    named = [*data.paths("train"), *data.paths("val"), *([data.data_root] if data.data_root else [])]
    urls = [path for path in named if is_url(path)]
    if not urls:
        return None
    from loader_service.remote.store import RemoteStore  # imported here: local data needs none of it

    folder = cache_folder(data.cache_dir)
    key = fingerprint([str(folder), config_to_tree(data.remote)])
    with _lock:
        if key not in _stores:
            _stores[key] = RemoteStore(folder, data.remote)
        _stores[key].cover(urls)
        return _stores[key]


def cache_folder(cache_dir: str | None) -> Path:
    """The folder `remote` in the config's cache folder, or else in the user's."""
    try:
        base = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"no folder for copies of remote files ({error}): name one with --cache-dir or data.cache_dir"
        ) from error
    return (base if cache_dir else base / "stoker").resolve() / "remote"
