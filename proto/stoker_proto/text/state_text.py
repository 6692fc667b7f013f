"""The robot's state (joints, gripper) as text, as in pi0.5: one whole number of 0-255 per dimension.

    [0.31, -1.2, 0.04]   ->   "168 0 133"

A dimension is normalised by its 1st and 99th percentile over the train data to [-1, 1], clipped, and divided into 256 equal bins.
A constant dimension is 128. Source: openpi `models/tokenizer.py` (discrete state input), which does not clip.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from stoker_proto.actions.statistics import ActionStatistics
from stoker_proto.errors import DataError

NUM_BINS = 256
_EDGES = np.linspace(-1, 1, NUM_BINS + 1)[:-1]


@dataclass(frozen=True, slots=True)
class StateText:
    """Writes the states of one data set."""

    statistics: ActionStatistics
    """Statistics of the states in the train data."""

    def write(self, state: ArrayLike) -> str:
        """The text of a state float32[S] in the units of the dataset. Raises DataError."""
        values = np.asarray(state, np.float32)
        if values.shape != (self.statistics.dim,):
            raise DataError(
                f"a state of shape {list(values.shape)}: {self.statistics.dim} numbers are expected, as in the train data"
            )
        if not np.isfinite(values).all():
            raise DataError(f"the state holds {values[~np.isfinite(values)][0]}: finite numbers are expected")
        bins = np.digitize(self.statistics.normalise(values), _EDGES) - 1
        return " ".join(map(str, bins.tolist()))

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats exact."""
        return {"num_bins": NUM_BINS, "statistics": self.statistics.to_json()}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The object that `to_json` described. Raises DataError."""
        if tree.get("num_bins") != NUM_BINS:
            raise DataError(f"a state of {tree.get('num_bins')} bins: this program writes {NUM_BINS}; build it anew")
        return cls(ActionStatistics.from_json(tree["statistics"]))
