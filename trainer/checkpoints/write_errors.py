"""Errors of writing checkpoints and exports: a full disk is one line with a way out, not a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from stoker_proto.errors import HostError

_TORCH = ("PytorchStreamWriter failed", "[enforce fail at inline_container.cc")
"""How errors of torch.save's writer begin. It says no more, whatever the system said."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises HostError if something in the block cannot be written. Other errors pass."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise HostError(
            f"{folder} cannot be written ({reason}): make room there, or name another trainer.output_dir; with "
            "trainer.checkpoint.resume=auto the run then resumes from its newest whole checkpoint"
        ) from error


def _reason(error: Exception) -> str | None:
    if isinstance(error, OSError):
        return f"{error.strerror or error}"
    if isinstance(error, SafetensorError) or any(words in str(error) for words in _TORCH):
        return " ".join(str(error).split())[:200]
    return None
