"""OpenVLA's action bins: each dimension of each timestep becomes one of 256 uniform bins between the quantiles q01 and q99.

A code is `digitize - 1`, and the last code decodes like the one before it. The reason: 256 edges from -1 to 1 bound 255 bins.
`np.digitize` numbers them from 1, so -1.0 gives 1. The value 1.0 lies on the last edge and gives 256, one more than there are
bins:

    value -1.0   digitize 1     code 0     id 32000 - 1   = 31999   decodes as centre 0
    value  0.0   digitize 128   code 127   id 32000 - 128 = 31872   decodes as centre 127
    value  1.0   digitize 256   code 255   id 32000 - 256 = 31744   decodes as centre 254 (there is no centre 255)

Source: openvla `prismatic/vla/action_tokenizer.py`.
"""

from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.base import ActionCodec, Float32Array, Int32Array, Int64Array
from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.errors import ConfigError


class UniformBins(ActionCodec):
    """One token per dimension. The error is at most 1/255 of half of q01..q99; values outside are clipped."""

    name: ClassVar[str] = "bins"

    def __init__(self, statistics: ActionStatistics, *, chunk: int, num_bins: int = 256) -> None:
        """Args:
        num_bins: number of edges between -1 and 1, and of codes. There is one bin fewer (see the module).
        """
        super().__init__(statistics, chunk)
        if not 2 <= num_bins <= 65_536:
            raise ConfigError(f"num_bins {num_bins}: it must be in [2, 65536]; OpenVLA has 256")
        self.num_codes = num_bins
        self.max_tokens = chunk * self.dim
        self._edges = np.linspace(-1.0, 1.0, num_bins)
        self._centres = (self._edges[:-1] + self._edges[1:]) / 2.0

    def encode(self, actions: npt.ArrayLike) -> Int32Array:
        """int32[N, chunk * D]: the dimensions of the first timestep, then those of the next."""
        normalised = self.statistics.normalise(self.checked_actions(actions))  # [N, chunk, D]
        codes = np.digitize(np.clip(normalised, -1.0, 1.0), self._edges) - 1
        return codes.reshape(len(codes), self.max_tokens).astype(np.int32)

    def decode(self, codes: npt.ArrayLike) -> Float32Array:
        """float32[N, chunk, D]: the bins' centres in the dataset's units."""
        checked = self.checked_codes(codes)
        centres = self._centres[np.minimum(checked, len(self._centres) - 1)]
        return self.statistics.unnormalise(centres.reshape(len(checked), self.chunk, self.dim))

    def clamped(self, actions: npt.ArrayLike) -> Int64Array:
        """Numbers outside q01..q99, or outside -1..1 without the mask. In a constant dimension: all other values."""
        checked, known = self.checked_actions(actions), self.statistics
        is_constant = known.min == known.max
        low = np.where(is_constant, known.min, np.where(known.mask, known.q01, -1.0)).astype(np.float32)
        high = np.where(is_constant, known.max, np.where(known.mask, known.q99, 1.0)).astype(np.float32)
        slack = np.float32(5e-7) * (high - low)
        outside = (checked < low - slack) | (checked > high + slack)  # bool[N, chunk, D]
        counts: Int64Array = outside.sum(axis=(0, 1), dtype=np.int64)
        return counts

    def to_json(self) -> dict[str, Any]:
        """Name, chunk, number of bins, statistics."""
        return {
            "version": 1,
            "name": self.name,
            "chunk": self.chunk,
            "num_bins": self.num_codes,
            "statistics": self.statistics.to_json(),
        }

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> Self:
        """The codec that `to_json` described."""
        return cls(ActionStatistics.from_json(d["statistics"]), chunk=d["chunk"], num_bins=d["num_bins"])

    @classmethod
    def fit(cls, sample: Float32Array, statistics: ActionStatistics, *, chunk: int, **options: Any) -> Self:
        """Needs only the statistics. Options: `num_bins` (256)."""
        return cls(statistics, chunk=chunk, **options)
