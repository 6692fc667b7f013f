"""The one place where Stoker unpickles: NPZ and NPY files with a pickled dict, as RL4VLA's collector writes them.

Unpickling can execute code that the file brings along. So nothing but `loader-convert rl4vla --trust-pickle` comes here, and
what a pickle may name is narrowed to numpy arrays, numbers and images; an image becomes a `PickledImage`, which only holds
bytes. That stops the known tricks; it is no sandbox, which is why the flag is needed all the same.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from loader_service.convert.images import check_pixels
from loader_service.sources.lfs import refuse_pointer
from stoker_proto.errors import DataError

MAX_MEMBER_BYTES = 4 << 30
_MAX_RATIO = 1032  # of deflate
_NEW_NAMES = int(np.__version__.partition(".")[0]) >= 2
_ALLOWED = frozenset(
    {
        *(
            (f"{core}.multiarray", name)
            for core in ("numpy.core", "numpy._core")
            for name in ("_reconstruct", "scalar")
        ),
        *((f"{core}.numeric", "_frombuffer") for core in ("numpy.core", "numpy._core")),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("collections", "OrderedDict"),
    }
)
_IMAGES = frozenset(
    {("PIL.Image", "Image"), ("PIL.PngImagePlugin", "PngImageFile"), ("PIL.JpegImagePlugin", "JpegImageFile")}
)


class PickledImage:
    """The state of a pickled PIL image: `mode`, `size` (width, height) and raw bytes, looked at but not decoded."""

    mode: str
    size: tuple[int, int]
    data: bytes

    def __setstate__(self, state: Any) -> None:
        """state: [info, mode, size, palette, data], as PIL writes it."""
        if not isinstance(state, list | tuple) or len(state) < 5:
            raise DataError("a pickled image of an unknown version of Pillow")
        mode, size, data = state[1], state[2], state[4]
        if not (isinstance(mode, str) and isinstance(size, tuple) and len(size) == 2 and isinstance(data, bytes)):
            raise DataError("a damaged pickled image")
        if not all(isinstance(length, int) for length in size):
            raise DataError("a damaged pickled image")
        check_pixels(*size)
        self.mode, self.size, self.data = mode, size, data


class _NarrowUnpickler(pickle.Unpickler):
    """Builds nothing but containers, numbers, texts, numpy arrays and `PickledImage`."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name. Raises DataError for all else."""
        if (module, name) in _IMAGES:
            return PickledImage
        if (module, name) in _ALLOWED:
            if _NEW_NAMES:  # the old ones still work there, with a warning for each
                module = module.replace("numpy.core.", "numpy._core.")
            return super().find_class(module, name)
        raise DataError(
            f"the pickle names {module}.{name}: only numpy arrays and PIL images are unpickled; a file that needs more is not "
            "one of RL4VLA's, or hostile"
        )


def load_pickled_dict(path: Path) -> dict[str, Any]:
    """The dict of `np.savez(path, dict)` or `np.save(path, dict)`. Raises DataError."""
    refuse_pointer(path)
    try:
        content = _member(path) if zipfile.is_zipfile(path) else path.read_bytes()
        return _unpickle(content)
    except DataError as error:
        raise DataError(error.reason, file=str(path), field=error.field) from error
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"it cannot be read ({error}): copy it again", file=str(path)) from error


def _member(path: Path) -> bytes:
    """The bytes of arr_0.npy; its CRC is compared by `zipfile`."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if names != ["arr_0.npy"]:
            raise DataError(f"it holds {', '.join(names[:5]) or 'nothing'}: one pickled dict, arr_0, is expected")
        member = archive.infolist()[0]
        if member.file_size > min(MAX_MEMBER_BYTES, max(1, member.compress_size) * _MAX_RATIO):
            raise DataError(
                f"{member.file_size} bytes in {member.compress_size}: at most {MAX_MEMBER_BYTES}", field="arr_0"
            )
        return archive.read(member)


def _unpickle(content: bytes) -> dict[str, Any]:
    stream = io.BytesIO(content)
    try:
        version = npy_format.read_magic(stream)
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        if dtype != np.dtype(object) or shape != ():
            raise DataError(f"an array {dtype} {list(shape)}: one pickled dict is expected", field="arr_0")
        array = _NarrowUnpickler(stream).load()
    except DataError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"a damaged pickle ({type(error).__name__}: {error})", field="arr_0") from error
    if isinstance(array, np.ndarray) and array.dtype == object and array.shape == ():
        array = array.item()
    if not isinstance(array, dict):
        raise DataError(f"a pickled {type(array).__name__}: a dict is expected", field="arr_0")
    return array
