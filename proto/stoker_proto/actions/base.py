"""The interface of every action codec: actions -> codes -> actions. It is fitted once, saved as JSON and has a fingerprint.

Letters: N samples, D dimensions of an action, M actions that a codec is fitted to; `chunk` timesteps per sample.
"""

import base64
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.errors import ConfigError, DataError
from stoker_proto.hashing import fingerprint

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class ActionCodec(ABC):
    """A chunk of actions <-> codes in [0, num_codes). `vocabulary` maps the codes to token ids."""

    name: ClassVar[str]
    """The key of `stoker_proto.actions.CODECS`."""

    fits_chunks: ClassVar[bool] = False
    """Whether `fit` takes whole chunks float32[M, chunk, D] instead of single actions."""

    num_codes: int
    """Number of distinct codes."""
    max_tokens: int
    """Most tokens of one chunk; codecs of fixed length always use this many."""
    code_lengths: Int32Array | None = None
    """Codecs of variable length: int32[num_codes], how many of a chunk's `max_tokens` places each code fills. A chunk is complete
    when all places are filled. None: each code fills one place, so a chunk always has `max_tokens` codes."""

    def __init__(self, statistics: ActionStatistics, chunk: int) -> None:
        if chunk < 1:
            raise ConfigError(f"an action chunk of {chunk} timesteps; it needs at least 1")
        self.statistics = statistics
        self.dim = statistics.dim
        self.chunk = chunk

    @abstractmethod
    def encode(self, actions: npt.ArrayLike) -> Int32Array | list[Int32Array]:
        """Actions float32[N, chunk, D] in the dataset's units -> codes int32[N, max_tokens] (variable length: a list
        of int32[n]).

        Raises:
            DataError: a wrong shape, or a value that is not finite; it names sample, timestep and dimension.
        """

    @abstractmethod
    def decode(self, codes: npt.ArrayLike) -> Float32Array:
        """Codes int32[N, tokens] (variable length: or a list of int32[n]) -> actions float32[N, chunk, D] in the dataset's
        units.

        Raises:
            DataError: a code outside [0, num_codes), or a wrong number of codes.
        """

    @abstractmethod
    def clamped(self, actions: npt.ArrayLike) -> Int64Array:
        """int64[D]: how many numbers of each dimension of the actions float32[N, chunk, D] the codec cannot express and so
        clamps."""

    def num_clamped(self, actions: npt.ArrayLike) -> int:
        """The sum of `clamped` over all dimensions."""
        return int(self.clamped(actions).sum())

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything that `from_json` needs to build the same codec; floats are exact."""

    @classmethod
    @abstractmethod
    def from_json(cls, d: dict[str, Any]) -> Self:
        """The codec that `to_json` described. `stoker_proto.actions.codec_from_json` reads a codec of any name."""

    @classmethod
    @abstractmethod
    def fit(cls, sample: Float32Array, statistics: ActionStatistics, *, chunk: int, **options: Any) -> Self:
        """Fit to actions float32[M, D], or to chunks if `fits_chunks`. A pure function with the same bits on every machine."""

    @property
    def tokens_per_timestep(self) -> int | None:
        """For a codec that writes one timestep after the other; None where each token describes the whole chunk."""
        return self.max_tokens // self.chunk if self.code_lengths is None else None

    def tokens_of(self, timesteps: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """bool[chunk] -> bool[max_tokens]: the tokens of these timesteps. Raises DataError where timesteps have no own tokens."""
        count = self.tokens_per_timestep
        if count is None:
            raise DataError(
                f"codec {self.name} has no tokens of single timesteps: set data.action.learn_padding to true"
            )
        if timesteps.shape != (self.chunk,):
            raise DataError(f"action_is_pad of shape {list(timesteps.shape)}: bool[{self.chunk}] is expected")
        return np.repeat(timesteps, count)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON. Codecs with equal fingerprints give equal codes."""
        return fingerprint(self.to_json())

    def checked_actions(self, actions: npt.ArrayLike) -> Float32Array:
        """The actions as finite float32[N, chunk, D]. Raises DataError."""
        array = np.asarray(actions, dtype=np.float32)
        if array.ndim != 3 or array.shape[1:] != (self.chunk, self.dim):
            raise DataError(
                f"row 0: actions of shape {list(array.shape)}; this codec takes [N, {self.chunk}, {self.dim}] "
                f"({self.chunk} timesteps of {self.dim} dimensions)"
            )
        if not np.isfinite(array).all():
            row, timestep, column = np.argwhere(~np.isfinite(array))[0].tolist()
            raise DataError(
                f"row {row}, timestep {timestep}: dimension {column} is {array[row, timestep, column]}; "
                "an action needs finite numbers"
            )
        return array

    def checked_codes(self, codes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The codes as int64[N, max_tokens], each in [0, num_codes). Raises DataError."""
        array = np.asarray(codes)
        if array.ndim != 2 or array.shape[1] != self.max_tokens:
            raise DataError(
                f"codes of shape {list(array.shape)}; a chunk has {self.max_tokens} codes: [N, {self.max_tokens}]"
            )
        if array.dtype.kind not in "iu":
            raise DataError(f"codes of type {array.dtype}; codes are integers")
        outside = (array < 0) | (array >= self.num_codes)
        if outside.any():
            row, column = np.argwhere(outside)[0].tolist()
            raise DataError(
                f"row {row}: code {array[row, column]} at position {column} is outside [0, {self.num_codes})"
            )
        return array.astype(np.int64)


def array_to_json(array: npt.NDArray[Any]) -> dict[str, Any]:
    """An array as its shape, type and little-endian bytes in Base64, so that floats stay exact."""
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": little.dtype.str,
        "shape": list(array.shape),
        "base64": base64.b64encode(little.tobytes()).decode("ascii"),
    }


def array_from_json(d: dict[str, Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """The array that `array_to_json` wrote. Raises DataError where its type, shape or length is wrong."""
    expected = np.dtype(dtype).newbyteorder("<")
    try:
        data, shape, found = base64.b64decode(d["base64"], validate=True), tuple(d["shape"]), d["dtype"]
        if found != expected.str:
            raise ValueError(f"type {found}, expected {expected.str}")
        return np.frombuffer(data, dtype=expected).reshape(shape).astype(dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"a damaged array in an action codec: {error}; run loader-prepare again") from error
