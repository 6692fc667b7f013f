"""Where the cache of encoded records lies: one folder for all runs of a host.

{loader.disk_cache_dir}, or {data.cache_dir}/encoded, or ~/.cache/stoker/encoded
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import shutil
from pathlib import Path

from loader_service.disk_cache.eviction import list_segments
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError
from stoker_proto.host.trouble import check_host

logger = logging.getLogger(__name__)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def disk_cache_folder(config: Config) -> Path | None:
    """The folder; None where the cache is off. Raises ConfigError where the user has no home."""
    if not config.loader.disk_cache_gb:
        return None
    named, cache_dir = config.loader.disk_cache_dir, config.data.cache_dir
    try:
        if named is not None:
            return Path(named).expanduser().resolve()
        base = Path(cache_dir or os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise ConfigError(f"no folder for loader.disk_cache_gb ({error}): name one in loader.disk_cache_dir") from error
    return (base if cache_dir else base / "stoker").resolve() / "encoded"


def disk_cache_bytes(config: Config) -> int:
    """`loader.disk_cache_gb` in bytes."""
    return int(config.loader.disk_cache_gb * 1e9)


def check_disk_cache(config: Config) -> None:
    """Make the folder and try to write in it. A full disk is logged: loaders then serve without keeping more.

    Raises ConfigError for a folder that cannot be written, HostError for trouble of the host."""
    folder = disk_cache_folder(config)
    if folder is None:
        return
    probe = folder / f".probe-{secrets.token_hex(4)}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"probe")
        finally:
            probe.unlink(missing_ok=True)
        room = shutil.disk_usage(folder).free + sum(segment.size_bytes for segment in list_segments(folder))
    except OSError as error:
        if error.errno in _FULL:
            logger.warning("%s: %s: no encoded records are kept there", folder, error.strerror)
            return
        check_host(error, str(folder))
        raise _unusable(folder, error) from error
    if disk_cache_bytes(config) > room:
        logger.warning(
            "loader.disk_cache_gb is %g, and the disk of %s has room for %.1f GB: lower it, or what else is written there "
            "will find the disk full",
            config.loader.disk_cache_gb, folder, room / 1e9,
        )  # fmt: skip


def _unusable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"loader.disk_cache_dir: {folder} cannot be written ({error.strerror or error}): name another folder, or set "
        "loader.disk_cache_gb to 0"
    )
