"""FAST: a whole chunk of actions as a variable number of tokens (Pertsch et al. 2025, `pi0-FAST`).

    actions [K, D]  ->  scaled by q01..q99 (`space`)  ->  DCT over time (`cosine`)  ->  times `scale`, rounded
    ->  all dimensions of frequency 0, then of frequency 1, ...  ->  byte-pair encoding (`byte_pairs`)

    chunk 3, one dimension, [0.1 0.2 0.3], scale 10:  amplitudes [3 -1 0], symbols [3+1 -1+1 0+1], tokens e.g. [97]

Movements are smooth, so most amplitudes of high frequencies are 0, and long runs of zeros become one token: a chunk of 10
timesteps takes a third of the tokens of `bins`. Constant dimensions take no tokens. A discrete dimension (a gripper that is -1
or 1) decodes to one of its values.

Values outside the fitted range are clamped to it; `num_clamped` counts them, and a warning is logged.

Sources: arXiv 2501.09747; openpi `src/openpi/models/tokenizer.py`; physical-intelligence/fast `processing_action_tokenizer.py`.

Letters: N chunks, K timesteps, D dimensions of an action, C of them not constant, S symbols, V tokens.
"""

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.base import ActionCodec, Float32Array, Int32Array
from stoker_proto.actions.byte_pairs import Merge, PairEncoder, learn_merges
from stoker_proto.actions.cosine import MAX_MAGNITUDE, MAX_TIMESTEPS, CosineTransform
from stoker_proto.actions.space import ActionSpace
from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Int64Array = npt.NDArray[np.int64]

_FIT_SYMBOLS = 1 << 19
"""Most symbols that merges are learned on, so that a fit takes seconds for any chunk."""
_MAX_VOCAB = 4_096


class FastCodec(ActionCodec):
    """Tokens of a whole chunk's frequencies; their number varies."""

    name: ClassVar[str] = "fast"
    fits_chunks: ClassVar[bool] = True

    def __init__(
        self,
        statistics: ActionStatistics,
        *,
        chunk: int,
        space: ActionSpace,
        scale: float,
        lowest: int,
        num_symbols: int,
        merges: Sequence[Merge],
    ) -> None:
        """Args:
        scale: amplitudes are rounded to multiples of 1/scale.
        lowest: the amplitude (times scale) of symbol 0. Symbol s stands for lowest + s.
        """
        super().__init__(statistics, chunk)
        _check_chunk(chunk)
        if len(space.values) != self.dim or num_symbols < 1 or not scale > 0:
            raise DataError(
                f"a damaged action codec: {len(space.values)} dimensions of {self.dim}, {num_symbols} symbols, scale "
                f"{scale}; run loader-prepare again"
            )
        self.space, self.scale, self.lowest, self.num_symbols = space, scale, lowest, num_symbols
        self.merges = [(int(left), int(right)) for left, right in merges]
        self._pairs = PairEncoder(num_symbols, self.merges)
        self._cosine = CosineTransform(chunk)
        self._dims = _varying(space)
        self._warn_at = 1
        self._clamped_seen = 0
        self.num_codes = len(self._pairs.expansions)
        self.max_tokens = chunk * len(self._dims)
        self._lengths = np.array([len(expansion) for expansion in self._pairs.expansions], dtype=np.int32)
        self.code_lengths = self._lengths

    def encode(self, actions: npt.ArrayLike) -> list[Int32Array]:
        """N arrays int32[n], n from 1 to K * C."""
        checked = self.checked_actions(actions)
        amplitudes, outside = self._amplitudes(checked)
        self._note_clamped(int(outside.sum()), len(checked))
        rows = self._clamp(amplitudes).reshape(len(checked), self.max_tokens)  # frequency 0 of all dimensions first
        return [self._pairs.encode(row) for row in rows]

    def decode(self, codes: npt.ArrayLike | Sequence[npt.ArrayLike]) -> Float32Array:
        """Codes int[N, n], or N arrays int[n], -> float32[N, K, D] inside the range of the data.

        Raises:
            DataError: a code outside [0, V), or codes that stand for more or for fewer than K * C amplitudes.
        """
        rows: Any = codes
        symbols = np.empty((len(rows), self.max_tokens), dtype=np.int64)
        for number, row in enumerate(rows):
            symbols[number] = self._symbols(number, np.asarray(row))
        amplitudes = (symbols + self.lowest).reshape(len(symbols), self.chunk, len(self._dims))
        return self._from_scaled(self._cosine.backward(amplitudes) / self.scale)

    def clamped(self, actions: npt.ArrayLike) -> Int64Array:
        """Numbers outside the data's range, unknown values of discrete dimensions, and amplitudes outside the fitted range."""
        outside: Int64Array = self._amplitudes(self.checked_actions(actions))[1].sum(
            axis=(0, 1), dtype=np.int64
        )  # [D + C]
        counts = outside[: self.dim].copy()
        counts[self._dims] += outside[self.dim :]
        return counts

    def to_json(self) -> dict[str, Any]:
        """Range and merges as numbers, space in Base64."""
        return {
            "version": 1,
            "name": self.name,
            "chunk": self.chunk,
            "statistics": self.statistics.to_json(),
            "space": self.space.to_json(),
            "scale": self.scale,
            "lowest": self.lowest,
            "num_symbols": self.num_symbols,
            "merges": [list(merge) for merge in self.merges],
        }

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> "FastCodec":
        """The codec that `to_json` described."""
        return FastCodec(
            ActionStatistics.from_json(d["statistics"]),
            chunk=d["chunk"],
            space=ActionSpace.from_json(d["space"]),
            scale=float(d["scale"]),
            lowest=d["lowest"],
            num_symbols=d["num_symbols"],
            merges=[(left, right) for left, right in d["merges"]],
        )

    @classmethod
    def fit(  # type: ignore[override]  # the registry passes a codec its own options by name
        cls,
        sample: Float32Array,
        statistics: ActionStatistics,
        *,
        chunk: int,
        vocab_size: int = 1024,
        scale: float = 10.0,
        min_frequency: int = 2,
    ) -> "FastCodec":
        """Fit to chunks float32[M, K, D].

        Args:
            vocab_size: largest V. Amplitudes are fitted up to a quarter of it on each side of 0, so that one outlier does not use
                up all tokens.
            scale: a larger one is more exact and takes more tokens.
            min_frequency: pairs that occur less often are not merged.
        """
        if not 16 <= vocab_size <= _MAX_VOCAB:
            raise ConfigError(f"vocab_size {vocab_size}: it must be in [16, {_MAX_VOCAB}]; FAST has 1024")
        if not 0 < scale <= 10_000 or min_frequency < 1:
            raise ConfigError(f"scale {scale} and min_frequency {min_frequency}: scale in (0, 10000], at least 1")
        _check_chunk(chunk)
        if sample.ndim != 3 or sample.shape[1:] != (chunk, statistics.dim) or len(sample) == 0:
            raise DataError(
                f"chunks of shape {list(sample.shape)}: [M, {chunk}, {statistics.dim}] are needed for a fit"
            )
        space = ActionSpace.fit(sample.reshape(-1, statistics.dim), statistics, max_groups=1 << 62)
        dims = _varying(space)
        amplitudes = np.rint(CosineTransform(chunk).forward(_scaled(sample, space, dims)) * scale).astype(np.int64)
        most = vocab_size // 4
        lowest, highest = max(int(amplitudes.min()), -most), min(int(amplitudes.max()), most)
        symbols = (np.clip(amplitudes, lowest, highest) - lowest).reshape(len(sample), -1)
        merges = learn_merges(
            symbols[: max(1, _FIT_SYMBOLS // symbols.shape[1])], highest - lowest + 1, vocab_size, min_frequency
        )
        return FastCodec(
            statistics,
            chunk=chunk,
            space=space,
            scale=float(scale),
            lowest=lowest,
            num_symbols=highest - lowest + 1,
            merges=merges,
        )

    def _amplitudes(self, actions: Float32Array) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
        """float32[N, K, D] -> whole amplitudes int64[N, K, C], and bool[N, K, D + C]: what lies outside the fitted range."""
        found = np.rint(self._cosine.forward(_scaled(actions, self.space, self._dims)) * self.scale).astype(np.int64)
        return found, np.concatenate([self.space.outside(actions), found != self._clamp(found) + self.lowest], axis=2)

    def _clamp(self, amplitudes: Int64Array) -> Int64Array:
        """Amplitudes -> symbols in [0, S)."""
        return np.clip(amplitudes - self.lowest, 0, self.num_symbols - 1)

    def _symbols(self, number: int, codes: npt.NDArray[Any]) -> list[int]:
        """The K * C symbols of one chunk's codes."""
        if codes.ndim != 1 or (codes.dtype.kind not in "iu" and codes.size):
            raise DataError(f"row {number}: codes of shape {list(codes.shape)}, {codes.dtype}; codes are integers [n]")
        outside = (codes < 0) | (codes >= self.num_codes)
        if outside.any():
            raise DataError(f"row {number}: code {codes[outside][0]} is outside [0, {self.num_codes})")
        length = int(self._lengths[codes.astype(np.int64)].sum())
        if length != self.max_tokens:
            raise DataError(
                f"row {number}: {len(codes)} codes that stand for {length} amplitudes; a chunk has {self.max_tokens} "
                f"({self.chunk} frequencies of {len(self._dims)} dimensions)"
            )
        return self._pairs.decode(codes.tolist())

    def _from_scaled(self, values: npt.NDArray[np.float64]) -> Float32Array:
        """float64[N, K, C] -> actions float32[N, K, D] in their range; discrete dimensions take one of their values."""
        space = self.space
        actions = np.empty((*values.shape[:2], self.dim), dtype=np.float32)
        for d, known in enumerate(space.values):
            if len(known) == 1:
                actions[..., d] = known[0]
                continue
            raw = values[..., self._dims.index(d)] * np.float64(space.scale[d]) + np.float64(space.centre[d])
            actions[..., d] = np.clip(raw.astype(np.float32), space.lower[d], space.upper[d])
            if len(known) > 1:
                middles = (known[:-1] + known[1:]) * np.float32(0.5)
                actions[..., d] = known[np.searchsorted(middles, actions[..., d])]
        return actions

    def _note_clamped(self, number: int, num_chunks: int) -> None:
        """Log a warning for the first clamped number, then whenever the count has grown tenfold."""
        self._clamped_seen += number
        if self._clamped_seen >= self._warn_at:
            self._warn_at = 10 * self._clamped_seen
            logger.warning(
                "action codec fast: %d numbers or amplitudes clamped so far (%d in these %d chunks): they lie outside the data "
                "that it was fitted on; loader-prepare prints their share",
                self._clamped_seen,
                number,
                num_chunks,
            )


def _check_chunk(chunk: int) -> None:
    if chunk > MAX_TIMESTEPS:
        raise ConfigError(f"data.action.chunk is {chunk}: the codec fast takes at most {MAX_TIMESTEPS} timesteps")


def _varying(space: ActionSpace) -> list[int]:
    """The dimensions that are transformed: those with more than one value, or the first one if all are constant."""
    return [d for d, values in enumerate(space.values) if len(values) != 1] or [0]


def _scaled(actions: Float32Array, space: ActionSpace, dims: list[int]) -> Float32Array:
    """float32[N, K, C], most of it in [-1, 1]."""
    clipped = np.clip(actions, space.lower, space.upper)
    scaled = ((clipped - space.centre) / space.scale)[..., dims]
    result: Float32Array = np.clip(scaled, np.float32(-MAX_MAGNITUDE), np.float32(MAX_MAGNITUDE))
    return result
