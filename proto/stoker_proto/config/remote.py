"""`data.remote`: how files behind URLs in the data paths are fetched and kept.

    data:
      train_data_paths: [s3://robots/bridge/*.jsonl]
      remote: {cache_gb: 500, storage_options: {s3: {endpoint_url: https://objects.example.org}}}

Credentials never stand here: the file systems' libraries take them from the environment or from their own files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from stoker_proto.errors import ConfigError

_SECRET = re.compile(r"secret|token|passw|passphrase|credential|key|auth|signature|cookie|connection_string|sas", re.I)
_USER_IN_URL = re.compile(r"://[^/@]*@")


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteConfig:
    """Files behind URLs. Nothing here changes what is in a batch."""

    cache_gb: float = 100.0
    """Copies kept in a cache folder, in GB (10**9 bytes), over all loaders that share it; the oldest in use go first."""
    min_free_gb: float = 5.0
    """Copies give way, too, rather than leave less than this free on the disk, in GB."""
    concurrency: int = 16
    """Files that one process fetches at the same time."""
    deadline_s: float = 60.0
    """A file of which nothing has come for this long, over all retries, is given up."""
    recheck_hours: float = 24.0
    """A copy older than this is compared with its original before it is used (shards: at every start). 0: each time."""
    storage_options: dict[str, Any] = field(default_factory=dict)
    """Protocol -> options of its fsspec file system, e.g. {s3: {endpoint_url: https://objects.example.org}}; no credentials."""

    def check(self) -> None:
        """Rules of the values. Raises ConfigError."""
        for name in ("cache_gb", "deadline_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"data.remote.{name} is {getattr(self, name)}: it must be above 0")
        for name in ("min_free_gb", "recheck_hours"):
            if getattr(self, name) < 0:
                raise ConfigError(f"data.remote.{name} is {getattr(self, name)}: it must not be negative")
        if not 1 <= self.concurrency <= 256:
            raise ConfigError(f"data.remote.concurrency is {self.concurrency}: 1 to 256 are possible")
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
