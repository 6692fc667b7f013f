"""One run at a time in `output_dir`: two runs that write and delete checkpoints there would destroy each other's.

Rank 0 locks `{output_dir}/in-use` until its process ends, however that ends. A file that was left over without a lock does not
matter. The file holds the owner's process number and host, for the error message of a second run.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from pathlib import Path

from stoker_proto.errors import ConfigError
from stoker_proto.host.files import open_lock_file, try_lock
from trainer.engine.ranks import Ranks, text_of_first_rank

log = logging.getLogger(__name__)

IN_USE = "in-use"
_MAX_OWNER_BYTES = 4096


def lock_output_dir(folder: Path, ranks: Ranks) -> None:
    """Lock `folder` for this run; every rank calls it. Raises ConfigError, the same on all ranks, if another run has it."""
    refusal = ""
    if ranks.is_first:
        try:
            lock_folder(folder)
        except ConfigError as error:
            refusal = str(error)
    if refusal := text_of_first_rank(refusal, ranks):
        raise ConfigError(refusal)


def lock_folder(folder: Path) -> int:
    """Descriptor that holds the lock. It is never closed, so the lock lasts as long as the process. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_lock_file(folder / IN_USE)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        is_locked = try_lock(descriptor)
    except OSError as error:
        log.warning(
            "%s cannot be locked (%s): make sure yourself that no other run writes there",
            folder / IN_USE, error.strerror,
        )  # fmt: skip
        is_locked = True
    if not is_locked:
        owner = _owner(descriptor)
        os.close(descriptor)
        raise ConfigError(
            f"trainer.output_dir is {str(folder)!r}: {owner} is training there, and two runs would destroy each other's "
            "checkpoints; wait for its end or end it, or name another trainer.output_dir"
        )
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except OSError as error:  # a full disk, say: the other ranks must hear of it
        os.close(descriptor)
        raise _unwritable(folder, error) from error
    return descriptor


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    name = error.filename or folder / IN_USE
    return ConfigError(
        f"trainer.output_dir is {str(folder)!r}: {name} cannot be written ({error.strerror}); name another folder"
    )


def _owner(descriptor: int) -> str:
    """Process and host from the file; the owner may not have written them yet."""
    try:
        found = json.loads(os.pread(descriptor, _MAX_OWNER_BYTES, 0))
        return f"process {int(found['pid'])} on host {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
