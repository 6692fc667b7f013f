"""Actions to test with: made of additions only, so that the same ones come out on every machine."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from stoker_proto.actions import ActionStatistics, StatisticsAccumulator
from stoker_proto.actions.kmeans import uniform

Actions = npt.NDArray[np.float32]


def _smooth_actions(count: int, *, seed: int, length: int = 50) -> Actions:
    """float32[count, 7]: trajectories of 6 dimensions that move smoothly about 0, and a gripper -1.0 or 1.0."""
    num = -(-count // length)
    noise = uniform(num * (length + 24) * 6, seed).reshape(num, length + 24, 6) - 0.5
    total = np.cumsum(np.cumsum(noise, axis=1), axis=1)  # twice summed noise is smooth; differences keep it bounded
    smooth = (total[:, 24:] - 2 * total[:, 12:-12] + total[:, :-24]) / 12
    gripper = np.where(np.arange(length) < length * uniform(num, seed + 1000)[:, None], -1.0, 1.0)
    return np.concatenate([smooth, gripper[..., None]], axis=2).reshape(-1, 7)[:count].astype(np.float32)


@pytest.fixture(scope="session")
def smooth_actions() -> Callable[..., Actions]:
    """smooth_actions(count, seed=...) -> float32[count, 7]."""
    return _smooth_actions


@pytest.fixture(scope="session")
def summary() -> Callable[..., tuple[ActionStatistics, Actions]]:
    """summary(actions, mask=None) -> (statistics, sample) of actions float32[N, D] keyed 0, 1, 2 ..."""

    def summarise(actions: npt.ArrayLike, mask: npt.ArrayLike | None = None) -> tuple[ActionStatistics, Actions]:
        rows = np.asarray(actions, dtype=np.float32)
        accumulator = StatisticsAccumulator(rows.shape[1])
        accumulator.add(rows, np.arange(len(rows), dtype=np.uint64))
        return accumulator.finish(mask)

    return summarise
