"""`data.remote`: how files behind URLs in the data paths are fetched and cached.

    data:
      train_data_paths: [s3://robots/bridge/*.jsonl]
      remote: {cache_gb: 500, storage_options: {s3: {endpoint_url: https://objects.example.org}}}

This section never holds credentials: the file systems' libraries take them from the environment or from their own files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stoker_proto.config.rules import above, allowed, at_least
from stoker_proto.errors import ConfigError

_SECRET = re.compile(r"secret|token|passw|passphrase|credential|key|auth|signature|cookie|connection_string|sas", re.I)
_USER_IN_URL = re.compile(r"://[^/@]*@")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """How remote files are fetched and cached. Nothing here changes the content of a batch."""

    cache_gb: float = field(default=100.0, metadata=above(0))
    """Size of the cache folder in GB (10**9 bytes), over all loaders that share it. The least recently used copies go first."""
    min_free_gb: float = field(default=5.0, metadata=at_least(0))
    """Copies are deleted, too, when less than this is free on the disk, in GB."""
    concurrency: int = field(default=16, metadata=allowed("1 to 256 are possible", lambda number: 1 <= number <= 256))
    """Most files that one process fetches at the same time."""
    deadline_s: float = field(default=60.0, metadata=above(0))
    """A fetch fails when no byte has arrived for this long, over all retries."""
    recheck_hours: float = field(default=24.0, metadata=at_least(0))
    """A copy older than this is compared with its original before use (shards: at every start). 0: before each use."""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """Protocol -> options of its fsspec file system, e.g. {s3: {endpoint_url: https://objects.example.org}}; no credentials."""

    def check(self) -> None:
        """Check that `storage_options` is well formed and holds no credentials. Raises ConfigError."""
        for protocol, options in self.storage_options.items():
            if not isinstance(options, dict):
                raise ConfigError(
                    f"data.remote.storage_options.{protocol} is not a mapping: write {{PROTOCOL: {{OPTION: VALUE}}}}, e.g. "
                    "{s3: {endpoint_url: https://objects.example.org}}"
                )
            for path, value in _leaves(options, f"data.remote.storage_options.{protocol}"):
                name = path.rpartition(".")[2]
                if (_SECRET.search(name) and value != "anon") or _USER_IN_URL.search(str(value)):
                    raise ConfigError(
                        f"{path} may be a secret, and this file is copied into checkpoints and logs: leave it out, and give "
                        "credentials in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, ...) or in "
                        "fsspec's own configuration (~/.config/fsspec)"
                    )


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield f"{path}.{key}", None
            yield from _leaves(value, f"{path}.{key}")
        elif isinstance(value, list | tuple):
            yield from _leaves({str(i): item for i, item in enumerate(value)}, f"{path}.{key}")
            yield f"{path}.{key}", None
        else:
            yield f"{path}.{key}", value
