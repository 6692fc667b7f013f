"""Trouble of the host, injected: below a folder `os.open`, `os.pread`, `os.preadv`, `open`, h5py, pyarrow and PyAV fail with an
errno; or, for real, the process has no descriptor left."""

from __future__ import annotations

import builtins
import errno
import gc
import importlib.util
import io
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_LIBRARIES = {
    "pyarrow.parquet": ("read_metadata", "read_schema", "read_table", "ParquetFile"),
    "pyarrow": ("memory_map",),
    "av": ("open",),
    "h5py": ("File",),
}
"""What opens files by itself, where it is installed."""


class FailingFile(io.BytesIO):
    """An open file whose reads fail."""

    error: Callable[[], BaseException]

    def read(self, *_: Any) -> bytes:  # type: ignore[override]
        raise self.error()

    readline = readinto = readall = read1 = peek = read  # type: ignore[assignment]


@contextmanager
def failing(folder: Path, operation: str, error: Callable[[], BaseException]) -> Iterator[list[str]]:
    """Every open, or every read, of a file below the folder raises error(). Gives the paths where it did."""
    hit: list[str] = []
    below = f"{folder.resolve()}{os.sep}"

    def strike(path: object) -> None:
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(below):
            hit.append(os.fspath(path))
            raise error()

    def wrapped(real: Callable[..., Any], is_open: bool, *, gives_file: bool = False) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **keywords: Any) -> Any:
            if is_open == (operation == "open"):
                strike(path)
            elif gives_file and operation == "read":
                opened = real(path, *arguments, **keywords)
                if isinstance(path, int) or not os.fspath(path).startswith(below):
                    return opened
                opened.close()
                hit.append(os.fspath(path))
                broken = FailingFile()
                broken.error = error  # type: ignore[method-assign]
                return broken
            return real(path, *arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        real_open = builtins.open
        for module in (builtins, io):
            patch.setattr(module, "open", wrapped(real_open, True, gives_file=True))
        patch.setattr(os, "open", wrapped(os.open, True))
        for name in ("pread", "preadv"):
            patch.setattr(os, name, wrapped(getattr(os, name), False))
        for library, names in _LIBRARIES.items():
            if importlib.util.find_spec(library.partition(".")[0]) is None:
                continue
            module = importlib.import_module(library)
            for name in names:
                patch.setattr(module, name, wrapped(getattr(module, name), True))
        yield hit


def raising(name: str) -> Callable[[], BaseException]:
    if name == "MemoryError":
        return MemoryError
    number = getattr(errno, name)
    return lambda: OSError(number, os.strerror(number))


@contextmanager
def no_descriptors() -> Iterator[None]:
    """The process has none left, and gets none back: what earlier tests left in cycles holds descriptors too."""
    gc.collect()
    gc.disable()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 16
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    taken = []
    try:
        while len(taken) <= most:
            try:
                taken.append(os.open(os.devnull, os.O_RDONLY))
            except OSError:
                break
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        gc.enable()
