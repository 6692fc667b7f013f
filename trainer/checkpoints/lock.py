"""One run at a time in `output_dir`: two that write and delete checkpoints there would destroy each other's.

Rank 0 holds `{output_dir}/in-use`, locked by flock(2), until its process ends, however that ends; a file that is left over says
nothing. It holds the owner's process number and host, for the message to the next one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from stoker_proto.errors import ConfigError
from trainer.engine.zero import Ranks

log = logging.getLogger(__name__)

IN_USE = "in-use"
_MAX_BYTES = 4096
"""Of the message that goes to all ranks."""


def claim_output(folder: Path, ranks: Ranks) -> None:
    """Keep `folder` for this run; every rank calls it. ConfigError, the same one on all ranks, where another run has it."""
    refusal = ""
    if ranks.is_first:
        try:
            claim(folder)
        except ConfigError as error:
            refusal = str(error)
    text = bytearray(refusal.encode()[:_MAX_BYTES].ljust(_MAX_BYTES))
    message = torch.frombuffer(text, dtype=torch.uint8).to(ranks.device)
    dist.broadcast(message, src=0)
    if refusal := bytes(message.tolist()).decode(errors="replace").rstrip():
        raise ConfigError(refusal)


def claim(folder: Path) -> int:
    """The descriptor that holds the lock; nobody closes it, so that it lasts as long as the process. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / IN_USE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = _owner(descriptor)
        os.close(descriptor)
        raise ConfigError(
            f"trainer.output_dir is {str(folder)!r}: {owner} is training there, and two runs would destroy each other's "
            "checkpoints; wait for its end or end it, or name another trainer.output_dir"
        ) from None
    except OSError as error:
        log.warning(
            "%s cannot be locked (%s): see to it yourself that no other run writes there",
            folder / IN_USE, error.strerror,
        )  # fmt: skip
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    except OSError as error:  # a full disk: the other ranks wait to be told
        os.close(descriptor)
        raise _unwritable(folder, error) from error
    return descriptor


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    name = error.filename or folder / IN_USE
    return ConfigError(
        f"trainer.output_dir is {str(folder)!r}: {name} cannot be written ({error.strerror}); name another folder"
    )


def _owner(descriptor: int) -> str:
    """As it wrote itself down; it may be about to."""
    try:
        found = json.loads(os.pread(descriptor, _MAX_BYTES, 0))
        return f"process {int(found['pid'])} on host {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
