"""Do the codec's statistics describe the train data? They may have come with other data.

`data.action.statistics_path` and `data.action.codec_path` name such statistics.

    q01 = q99 = 0 in a published file, and the data moves there      85% of the numbers clamped: an error
    a dimension that never moves                                     comes back as its value: named
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from stoker_proto.actions import ActionCodec, ActionStatistics
from stoker_proto.config import ActionConfig
from stoker_proto.errors import ConfigError

_NOTABLE = 0.05
"""Share of clamped numbers of a dimension that is worth a warning. The data's own quantiles clamp 2%."""
_WIDER = 4.0
"""Published quantiles that span so many times those of the data leave a quarter of the codes for it."""


def clamped_share(codec: ActionCodec, sample: NDArray[np.float32]) -> NDArray[np.float64]:
    """float64[D]: the share of each dimension's numbers that the codec clamps, of actions float32[M, D] or chunks [M, K, D].

    If there are so few actions that quantiles always clamp one number at each end, these do not count.
    """
    if sample.ndim == 2:
        padding = np.repeat(sample[-1:], -len(sample) % codec.chunk, axis=0)
        sample = np.concatenate([sample, padding]).reshape(-1, codec.chunk, codec.dim)
    num_actions = sample.shape[0] * sample.shape[1]
    expected = 2 * math.ceil((num_actions - 1) / 100)
    clamped = codec.clamped(sample)
    return np.where(clamped > expected, clamped / num_actions, 0.0)


_FEW = 20
"""With the data's own statistics, fewer clamped numbers say nothing: the quantiles of a handful of actions lie inside them."""


def check_clamped(codec: ActionCodec, sample: NDArray[np.float32], own: ActionStatistics, action: ActionConfig) -> None:
    """Raises ConfigError where the codec clamps more of a dimension than data.action.most_clamped.

    sample: as `clamped_share` takes it; own: the train data's statistics.
    """
    share = clamped_share(codec, sample)
    d = int(share.argmax())
    is_given = action.statistics_path is not None or action.codec_path is not None
    if share[d] <= action.most_clamped or (not is_given and share[d] * len(sample) < _FEW):
        return
    known = codec.statistics
    raise ConfigError(
        f"dimension {d} of the actions: the codec clamps {share[d]:.1%} of the numbers, and data.action.most_clamped is "
        f"{action.most_clamped:g}. {source_of(action)} has q01 {known.q01[d]:.6g} and q99 {known.q99[d]:.6g}, and the train data "
        f"lies in {own.min[d]:.6g} to {own.max[d]:.6g}: {_way_out(action)}, or raise data.action.most_clamped"
    )


def statistics_findings(
    codec: ActionCodec, sample: NDArray[np.float32], own: ActionStatistics, action: ActionConfig
) -> list[str]:
    """What the user should know of each dimension: it never moves, it hardly moves, or the statistics fit it badly."""
    known, share, source = codec.statistics, clamped_share(codec, sample), source_of(action)
    is_given = action.statistics_path is not None or action.codec_path is not None
    lines = []
    for d in range(own.dim):
        low, high = own.min[d], own.max[d]
        if low == high and (known.min[d], known.max[d]) == (low, high):
            lines.append(f"dimension {d} never moves: it is {low:.6g} in all actions, and comes back as this value")
        elif is_given and known.q01[d] == known.q99[d] and known.mask[d]:
            lines.append(
                f"dimension {d}: {source} has q01 = q99 = {known.q01[d]:.6g}, and the train data has {low:.6g} to {high:.6g}"
            )
        elif not is_given and own.q01[d] == own.q99[d] and known.mask[d]:
            lines.append(
                f"dimension {d} hardly moves: q01 = q99 = {own.q01[d]:.6g}, so it is scaled by its range, {low:.6g} to {high:.6g}"
            )
        if is_given and share[d] > _NOTABLE:
            lines.append(
                f"dimension {d}: {share[d]:.1%} of the numbers are clamped. {source} has q01 {known.q01[d]:.6g} and q99 "
                f"{known.q99[d]:.6g}, and the train data {own.q01[d]:.6g} and {own.q99[d]:.6g}"
            )
        if is_given and known.q99[d] - known.q01[d] > _WIDER * (own.q99[d] - own.q01[d]) > 0:
            lines.append(
                f"dimension {d}: {source} has q01 {known.q01[d]:.6g} and q99 {known.q99[d]:.6g}, more than {_WIDER:g} times as "
                f"wide as the train data's {own.q01[d]:.6g} and {own.q99[d]:.6g}: few codes are left for it"
            )
    return lines


def source_of(action: ActionConfig) -> str:
    """Where the codec's statistics come from, for messages."""
    if action.codec_path is not None:
        return f"data.action.codec_path {action.codec_path}"
    if action.statistics_path is not None:
        return f"data.action.statistics_path {action.statistics_path}"
    return "the train data"


def _way_out(action: ActionConfig) -> str:
    if action.codec_path is not None:
        return "name a codec that was fitted to this data (loader-prepare --codec-out FILE)"
    if action.statistics_path is not None:
        return "name the statistics of this data, or remove the key, so that its own are taken"
    return "look for outliers in this dimension"
