"""Quality of a codec on given actions: tokens, error in the dataset's units, use of the codes."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stoker_proto.actions.base import ActionCodec
from stoker_proto.actions.statistics import Float32Array, Float64Array, check_rows
from stoker_proto.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecReport:
    """Measured on `num_actions` actions of D dimensions, by encoding and decoding them."""

    name: str
    num_actions: int
    chunk: int
    num_codes: int
    tokens_per_action: float
    """Mean tokens per timestep."""
    most_tokens: int
    """Largest number of tokens of a measured chunk."""
    max_tokens: int
    """Largest possible number of tokens of a chunk."""
    clamped: float
    """Share of the numbers that the codec cannot express (`ActionCodec.num_clamped`)."""
    mean_abs_error: Float64Array
    """float64[D], in the dataset's units."""
    max_abs_error: Float64Array
    """float64[D], in the dataset's units."""
    rms_error: Float64Array
    """float64[D], in the dataset's units."""
    code_use: Float64Array
    """float64[L]: the fraction of the codes that occur at each position of an action (vq: level; bins: dimension)."""
    code_perplexity: Float64Array
    """float64[L]: exp of the entropy of the codes at that position: num_codes if all are used equally, 1 if only one is used."""

    @property
    def rms_error_of_all(self) -> float:
        """Root mean square error over all dimensions."""
        return float(np.sqrt((self.rms_error**2).mean()))

    def format(self) -> str:
        """An aligned table of several lines."""
        lines = [
            f"action codec {self.name}: {self.tokens_per_action:.2f} tokens per action, {self.num_codes} codes, "
            f"chunk {self.chunk}, measured on {self.num_actions:,} actions",
            f"tokens per chunk: {self.tokens_per_action * self.chunk:.2f} on average, {self.most_tokens} the most here, "
            f"{self.max_tokens} the most possible; clamped: {self.clamped:.4%} of the numbers",
            f"{'dimension':>10} {'mean abs error':>15} {'rms error':>15} {'max abs error':>15}",
        ]
        errors = enumerate(zip(self.mean_abs_error, self.rms_error, self.max_abs_error, strict=True))
        lines += [f"{d:>10} {mean:>15.6f} {rms:>15.6f} {maximum:>15.6f}" for d, (mean, rms, maximum) in errors]
        mean, rms, maximum = self.mean_abs_error.mean(), self.rms_error_of_all, self.max_abs_error.max()
        lines.append(f"{'all':>10} {mean:>15.6f} {rms:>15.6f} {maximum:>15.6f}")
        lines.append(f"{'token':>10} {'codes used':>15} {'perplexity':>15}")
        uses = zip(self.code_use, self.code_perplexity, strict=True)
        lines += [f"{i:>10} {use:>15.1%} {perplexity:>15.1f}" for i, (use, perplexity) in enumerate(uses)]
        return "\n".join(lines)


def codec_report(codec: ActionCodec, actions: npt.ArrayLike) -> CodecReport:
    """Encode and decode chunks float32[N, chunk, D], or actions float32[M, D] that are cut into chunks in their order.

    The last chunk is filled up with the last action. Raises DataError where there are no actions.
    """
    rows = (
        codec.checked_actions(actions).reshape(-1, codec.dim)
        if np.ndim(actions) == 3
        else check_rows(actions, codec.dim)
    )
    if len(rows) == 0:
        raise DataError("no actions to report on")
    padding = np.repeat(rows[-1:], -len(rows) % codec.chunk, axis=0)
    chunks = np.concatenate([rows, padding]).reshape(-1, codec.chunk, codec.dim)  # [N, chunk, D]
    codes = codec.encode(chunks)
    decoded = _decode(codec, codes).reshape(-1, codec.dim)[: len(rows)]
    error = np.abs(decoded.astype(np.float64) - rows)
    uses = [_use(column, codec.num_codes) for column in _places(codec, codes)]
    return CodecReport(
        name=codec.name,
        num_actions=len(rows),
        chunk=codec.chunk,
        num_codes=codec.num_codes,
        tokens_per_action=sum(len(c) for c in codes) / (len(chunks) * codec.chunk),
        most_tokens=max(len(c) for c in codes),
        max_tokens=codec.max_tokens,
        clamped=codec.num_clamped(chunks) / chunks.size,
        mean_abs_error=error.mean(axis=0),
        max_abs_error=error.max(axis=0),
        rms_error=np.sqrt((error**2).mean(axis=0)),
        code_use=np.array([use for use, _ in uses]),
        code_perplexity=np.array([perplexity for _, perplexity in uses]),
    )


def _decode(codec: ActionCodec, codes: npt.NDArray[np.int32] | list[npt.NDArray[np.int32]]) -> Float32Array:
    if isinstance(codes, np.ndarray):
        return codec.decode(codes)
    return np.concatenate([codec.decode(one[None]) for one in codes])


def _places(
    codec: ActionCodec, codes: npt.NDArray[np.int32] | list[npt.NDArray[np.int32]]
) -> list[npt.NDArray[np.int32]]:
    """The codes by their position in an action. Codes of variable length have no positions: all are one group."""
    if isinstance(codes, np.ndarray):
        return list(codes.reshape(-1, codec.max_tokens // codec.chunk).T)
    return [np.concatenate(codes)]


def _use(codes: npt.NDArray[np.int32], num_codes: int) -> tuple[float, float]:
    """(fraction of the codes that occur, perplexity of their use)."""
    counts = np.bincount(codes, minlength=num_codes)
    share = counts[counts > 0] / max(1, counts.sum())
    return float(np.count_nonzero(counts) / num_codes), float(np.exp(-(share * np.log(share)).sum()))
