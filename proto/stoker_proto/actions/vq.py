"""The default codec: a k-means codebook of whole actions, then residual levels that refine it.

Each timestep becomes `levels` codes in [0, codebook_size), the coarsest level first. The first code selects the nearest of
`codebook_size` typical actions (`codebook`); the others divide the residual (`lattice`). Discrete and constant dimensions come
back exactly (`space`). The fit is bit-identical on every machine (`kmeans`), so loaders that fit on their own agree.

Measured against 256 uniform bins (7 tokens per action): tests/proto/actions/test_quality.py.

Letters: N samples, D dimensions of an action, C of them continuous, K codewords, L levels.
"""

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.base import ActionCodec, Float32Array, Int32Array, Int64Array
from stoker_proto.actions.bins import UniformBins
from stoker_proto.actions.codebook import ROWS_PER_CODEWORD, Codebook, cover
from stoker_proto.actions.lattice import ResidualLattice
from stoker_proto.actions.space import ActionSpace
from stoker_proto.actions.statistics import ActionStatistics, check_rows
from stoker_proto.errors import ConfigError, DataError

_MAX_GROUPS = 16
_MAX_LEVELS = 16
_FIT_ROWS = 16_384
_HELD_OUT_ROWS = 8_192


class VectorQuantizer(ActionCodec):
    """Residual vector quantisation of single actions: a fixed number of tokens per timestep."""

    name: ClassVar[str] = "vq"

    def __init__(
        self,
        statistics: ActionStatistics,
        *,
        chunk: int,
        space: ActionSpace,
        codebook: Codebook,
        lattice: ResidualLattice,
    ) -> None:
        super().__init__(statistics, chunk)
        widths = (len(space.values), len(space.continuous), len(space.continuous))
        if widths != (self.dim, codebook.codewords.shape[1], len(lattice.knots)):
            raise DataError(f"a damaged action codec: parts of {widths} dimensions; run loader-prepare again")
        self.space, self.codebook, self.lattice = space, codebook, lattice
        self.num_codes = len(codebook.codewords)
        self.levels = 1 + lattice.num_levels
        self.max_tokens = chunk * self.levels

    def encode(self, actions: npt.ArrayLike) -> Int32Array:
        """int32[N, chunk * L]: the levels of the first timestep, then those of the next."""
        checked = self.checked_actions(actions)
        points, groups = self.space.to_scaled(checked.reshape(-1, self.dim))
        codes = np.empty((len(points), self.levels), dtype=np.int32)
        first = self.codebook.nearest(points, groups)
        codes[:, 0] = first
        codes[:, 1:] = self.lattice.encode(points - self.codebook.codewords[first])
        return codes.reshape(len(checked), self.max_tokens)

    def decode(self, codes: npt.ArrayLike) -> Float32Array:
        """float32[N, chunk, D] in the dataset's units, inside the range of the data."""
        checked = self.checked_codes(codes)
        flat = checked.reshape(-1, self.levels)
        points = self.codebook.codewords[flat[:, 0]] + self.lattice.decode(flat[:, 1:])
        actions = self.space.from_scaled(points, self.codebook.groups[flat[:, 0]])
        return actions.reshape(len(checked), self.chunk, self.dim)

    def clamped(self, actions: npt.ArrayLike) -> Int64Array:
        """Numbers outside the fitted range, and unknown values of discrete dimensions."""
        counts: Int64Array = self.space.outside(self.checked_actions(actions)).sum(axis=(0, 1), dtype=np.int64)
        return counts

    def with_levels(self, levels: int, *, chunk: int | None = None) -> "VectorQuantizer":
        """The same codec with only its first `levels` levels (coarser), for chunks of `chunk` timesteps."""
        return VectorQuantizer(
            self.statistics,
            chunk=chunk or self.chunk,
            space=self.space,
            codebook=self.codebook,
            lattice=self.lattice.first(levels - 1),
        )

    def to_json(self) -> dict[str, Any]:
        """Codebook and lattice in Base64, statistics as numbers."""
        return {
            "version": 1,
            "name": self.name,
            "chunk": self.chunk,
            "statistics": self.statistics.to_json(),
            "space": self.space.to_json(),
            "codebook": self.codebook.to_json(),
            "lattice": self.lattice.to_json(),
        }

    @classmethod
    def from_json(cls, d: dict[str, Any]) -> "VectorQuantizer":
        """The codec that `to_json` described."""
        space = ActionSpace.from_json(d["space"])
        return VectorQuantizer(
            ActionStatistics.from_json(d["statistics"]),
            chunk=d["chunk"],
            space=space,
            codebook=Codebook.from_json(d["codebook"], space),
            lattice=ResidualLattice.from_json(d["lattice"]),
        )

    @classmethod
    def fit(  # type: ignore[override]  # the registry passes a codec its own options by name
        cls,
        sample: Float32Array,
        statistics: ActionStatistics,
        *,
        chunk: int,
        codebook_size: int = 256,
        levels: int | None = None,
    ) -> "VectorQuantizer":
        """Fit to actions float32[M, D].

        Args:
            codebook_size: K, the number of codes of each level.
            levels: L, tokens per action. None: the fewest whose error is below that of 256 uniform bins, measured on a part of
                the sample that the codebook was not fitted to; at most D, the number of tokens of bins.
        """
        if not 2 <= codebook_size <= 65_536:
            raise ConfigError(f"codebook_size {codebook_size}: it must be in [2, 65536]")
        if levels is not None and not 1 <= levels <= _MAX_LEVELS:
            raise ConfigError(f"levels {levels}: it must be in [1, {_MAX_LEVELS}], or left out")
        rows = check_rows(sample, statistics.dim)
        if len(rows) == 0:
            raise DataError("no actions to fit a codec to")
        space = ActionSpace.fit(rows, statistics, max_groups=min(_MAX_GROUPS, codebook_size // 2))
        fitted, held_out = _split(rows)
        first = Codebook.fit(*space.to_scaled(fitted), space, size=codebook_size, by_kmeans=True)
        codec = _refined(first, fitted, held_out, statistics, space, chunk, levels or statistics.dim)
        if levels is not None:
            return codec
        fewest, error = _fewest_levels(codec, held_out)
        if error > 1.0:  # actions without structure, such as uniform noise: a grid fits them better
            first = Codebook.fit(*space.to_scaled(fitted), space, size=codebook_size, by_kmeans=False)
            grid = _refined(first, fitted, held_out, statistics, space, chunk, statistics.dim)
            grid_fewest, grid_error = _fewest_levels(grid, held_out)
            codec, fewest = (grid, grid_fewest) if grid_error < error else (codec, fewest)
        return codec.with_levels(fewest)


def _refined(
    codebook: Codebook,
    fitted: Float32Array,
    held_out: Float32Array,
    statistics: ActionStatistics,
    space: ActionSpace,
    chunk: int,
    levels: int,
) -> VectorQuantizer:
    """The codec with this first level. Its residual levels are dense where `held_out` is and cover the whole box."""
    reach = [codebook.residuals(*space.to_scaled(fitted)), codebook.residuals(*cover(space))]
    lattice = ResidualLattice.fit(
        codebook.residuals(*space.to_scaled(held_out)),
        np.concatenate(reach),
        num_levels=levels - 1,
        num_codes=len(codebook.codewords),
    )
    return VectorQuantizer(statistics, chunk=chunk, space=space, codebook=codebook, lattice=lattice)


def _split(rows: Float32Array) -> tuple[Float32Array, Float32Array]:
    """(rows to fit the codebook to, rows held out), spread evenly over the sample. Of a tiny sample both are the whole."""
    if len(rows) < 2 * ROWS_PER_CODEWORD:
        return rows, rows
    held = np.arange(len(rows)) % 4 == 0
    return _thinned(rows[~held], _FIT_ROWS), _thinned(rows[held], _HELD_OUT_ROWS)


def _thinned(rows: Float32Array, limit: int) -> Float32Array:
    return rows if len(rows) <= limit else rows[np.arange(limit) * len(rows) // limit]


def _fewest_levels(codec: VectorQuantizer, rows: Float32Array) -> tuple[int, float]:
    """(the fewest levels whose error on actions float32[N, D] is below the limit, or all; their error divided by the limit).

    The limit is the error of 256 bins minus a margin. Actions of other trajectories have a slightly larger error than those of
    the sample, and a comparison on few actions is inexact.
    """
    margin = 0.95 - 2.0 / float(np.sqrt(max(16, len(rows))))
    bins = _errors(UniformBins(codec.statistics, chunk=1), rows, codec.space)
    error = 0.0
    for levels in range(1, codec.levels + 1):
        reached = _errors(codec.with_levels(levels, chunk=1), rows, codec.space)
        error = max(own / max(margin * other, 1e-30) for own, other in zip(reached, bins, strict=True))
        if error <= 1.0:
            return levels, error
    return codec.levels, error


def _errors(codec: VectorQuantizer | UniformBins, rows: Float32Array, space: ActionSpace) -> tuple[float, float]:
    """Sums of the absolute errors: in the dataset's units, and relative to each dimension's scale."""
    error = np.abs(codec.decode(codec.encode(rows[:, None]))[:, 0] - rows).astype(np.float64)
    return float(np.cumsum(error)[-1]), float(np.cumsum(error / space.scale)[-1])
