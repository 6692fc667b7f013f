"""What the config asks of this host beside the data."""

from __future__ import annotations

from collections.abc import Iterator

from loader_service.disk_cache.folder import check_disk_cache
from loader_service.doctor.facts import Examined
from loader_service.doctor.finding import Finding, of_error
from stoker_proto.errors import ConfigError


def disk_cache(examined: Examined) -> Iterator[Finding]:
    """Error: the folder of `loader.disk_cache_gb` cannot be written, so loaders would not start."""
    try:
        check_disk_cache(examined.config)
    except ConfigError as error:
        yield of_error(error, "disk_cache")
