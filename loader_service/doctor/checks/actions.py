"""Actions: their range, their statistics, and what the codec makes of them.

Letters: T actions, D dimensions, K actions in a chunk, N chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from loader_service.doctor.facts import EntryFacts, Examined
from loader_service.doctor.finding import Finding, Severity
from stoker_proto.actions import ActionStatistics

_CLAMPED_WARNING, _CLAMPED_ERROR = 0.1, 0.5
"""Share of a dimension's values outside the range that the codec can write. Data has about 0.02 outside its own q01..q99."""
_SATURATED = 0.5
_ERROR_TIMES = 5
"""An error of so many times the share of the warning is an error."""
_ENOUGH = 10
_WIDE = 10.0
"""A range above it is no normalised gripper: widths in mm, or steps of a motor (0 to 850)."""

_ENOUGH_STATES = 10
"""Sampled states of which it can be said that nothing moves."""


def round_trip(examined: Examined) -> Iterator[Finding]:
    """Mean error per dimension of action -> codes -> tokens -> `actions_from_ids`, against the dimension's range."""
    pairs = [pair for _, record in examined.records() for pair in record.round_trip]
    if not pairs or examined.codec is None:
        return
    known = examined.codec.statistics
    errors = np.concatenate([np.abs(decoded.astype(np.float64) - action) for action, decoded in pairs])  # [N * K, D]
    mean, most = errors.mean(axis=0), errors.max(axis=0)
    actions = np.concatenate([action for action, _ in pairs])
    span = np.maximum(known.max, actions.max(axis=0)) - np.minimum(known.min, actions.min(axis=0))  # [D]
    limit, shown = examined.round_trip_share, []
    for d in range(len(mean)):
        share = mean[d] / span[d] if span[d] > 0 else float(mean[d] > 1e-6)
        shown.append(f"{mean[d]:.3g}")
        if share > limit:
            problem = (
                f"tokens decode to other actions: mean error {mean[d]:.4g}, largest {most[d]:.4g}, in action units; the mean is "
                f"{share:.1%} of the range {span[d]:.4g}, and {limit:.1%} is the limit"
            )
            mask = (
                ""
                if known.mask[d]
                else "; the dimension is in data.action.unmasked, which clips it to [-1, 1]: take it out"
            )
            way_out = f"use another data.action.codec or more codes, or check the statistics{mask}"
            severity: Severity = "error" if share > _ERROR_TIMES * limit else "warning"
            yield Finding(severity, "round_trip", "", f"action[{d}]", problem, way_out)
    problem = f"mean error per dimension of {len(pairs)} chunks, in action units: {', '.join(shown)}"
    yield Finding("note", "round_trip", "", "", problem, "")


def dead_dimensions(examined: Examined) -> Iterator[Finding]:
    """Warning: a dimension of actions or states that never moves, or one of actions whose q01 is its q99 although it moves."""
    yield from _dead_states(examined)
    for entry, known in _statistics(examined):
        for d in range(known.dim):
            place = f"action[{d}]"
            if known.min[d] == known.max[d]:
                problem = f"the value is {known.min[d]:g} in all {known.count:,} actions"
                yield Finding(
                    "warning",
                    "dead_dimensions",
                    entry.path,
                    place,
                    problem,
                    "check that the robot's recording is complete",
                )
            elif known.q01[d] == known.q99[d]:
                problem = (
                    f"q01 = q99 = {known.q01[d]:g}, and values reach from {known.min[d]:g} to {known.max[d]:g}: normalisation "
                    "cannot tell them apart"
                )
                way_out = "check the outliers, or name the dimension in data.action.unmasked if it lies in [-1, 1]"
                yield Finding("warning", "dead_dimensions", entry.path, place, problem, way_out)


def _dead_states(examined: Examined) -> Iterator[Finding]:
    for entry in examined.entries:
        states = entry.states()
        if states is None or len(states) < _ENOUGH_STATES:
            continue
        for d in np.flatnonzero((states == states[0]).all(axis=0)).tolist():
            problem = f"the value is {states[0, d]:g} in all {len(states):,} sampled states"
            yield Finding(
                "warning", "dead_dimensions", entry.path, f"state[{d}]", problem, "check for a sensor that is stuck"
            )


def clamped(examined: Examined) -> Iterator[Finding]:
    """A large share of a dimension's values lies outside the range that the codec normalises by."""
    if examined.codec is None:
        return
    known = examined.codec.statistics
    low, high = np.where(known.mask, known.q01, -1.0), np.where(known.mask, known.q99, 1.0)
    slack = 1e-5 * np.maximum(high - low, 1e-6)
    for entry, actions in _actions(examined, known.dim):
        outside = (actions < low - slack) | (actions > high + slack)
        for d, share in enumerate(outside.mean(axis=0).tolist()):
            # A dimension without a mask outside [-1, 1] is `unmasked_range`'s.
            if share > _CLAMPED_WARNING and known.mask[d]:
                problem = (
                    f"{share:.1%} of {len(actions):,} sampled values are clamped to {low[d]:.4g}..{high[d]:.4g}, the q01 and q99 "
                    "of the codec's statistics"
                )
                way_out = "use statistics of this data (data.action.statistics_path, data.action.codec_path)"
                severity: Severity = "error" if share > _CLAMPED_ERROR else "warning"
                yield Finding(severity, "clamped", entry.path, f"action[{d}]", problem, way_out)


def unmasked_range(examined: Examined) -> Iterator[Finding]:
    """Error: a dimension that is not normalised (data.action.unmasked) has values outside [-1, 1], which are clipped."""
    if examined.codec is None:
        return
    mask = examined.codec.statistics.mask
    for entry, known in _statistics(examined):
        if known.dim != len(mask):
            continue
        for d in np.flatnonzero(~mask & ((known.min < -1) | (known.max > 1))).tolist():
            problem = f"values from {known.min[d]:g} to {known.max[d]:g} in a dimension that is not normalised: clipped to -1..1"
            way_out = "take it out of data.action.unmasked, so that it is normalised, or scale it in the data"
            yield Finding("error", "unmasked_range", entry.path, f"action[{d}]", problem, way_out)


def gripper(examined: Examined) -> Iterator[Finding]:
    """Note: how a gripper seems to be written. Two values only, or a last dimension in units of its own."""
    for entry in examined.entries:
        actions = entry.actions()
        if actions is None or len(actions) < _ENOUGH:
            continue
        for d in range(actions.shape[1]):
            values = np.unique(actions[:, d]).tolist()
            if values in ([0.0, 1.0], [-1.0, 1.0]):
                problem = f"only the values {values[0]:g} and {values[1]:g}: a gripper that is open or closed"
                yield Finding(
                    "note",
                    "gripper",
                    entry.path,
                    f"action[{d}]",
                    problem,
                    "check that your robot means the same by them",
                )
        low, high = float(actions[:, -1].min()), float(actions[:, -1].max())
        if high - low > _WIDE:
            problem = (
                f"the last dimension reaches from {low:g} to {high:g}: it seems to have its own units (mm, motor steps)"
            )
            way_out = "check that data.action.unmasked does not name it, and that all sources use the same units"
            yield Finding("note", "gripper", entry.path, f"action[{actions.shape[1] - 1}]", problem, way_out)


def saturated(examined: Examined) -> Iterator[Finding]:
    """Over half of a dimension's values are its smallest or its largest: a note for two-valued ones, else a warning."""
    for entry in examined.entries:
        for what, array in (("action", entry.actions()), ("state", entry.states())):
            if array is not None and len(array) >= _ENOUGH:
                for d in range(array.shape[1]):
                    yield from _saturated(entry, f"{what}[{d}]", array[:, d])


def _saturated(entry: EntryFacts, place: str, column: NDArray[np.float32]) -> Iterator[Finding]:
    values, counts = np.unique(column, return_counts=True)
    if len(values) == 1:
        return  # it never moves
    for name, at in (("minimum", 0), ("maximum", -1)):
        share = float(counts[at] / len(column))
        if share > _SATURATED:
            is_usual = len(values) == 2 or values[at] == 0  # open or closed; at rest
            severity: Severity = "note" if is_usual else "warning"
            problem = f"{share:.1%} of {len(column):,} sampled values are the {name}, {values[at]:g}"
            yield Finding(severity, "saturated", entry.path, place, problem, "check that nothing clipped it")


def _statistics(examined: Examined) -> Iterator[tuple[EntryFacts, ActionStatistics]]:
    for entry in examined.entries:
        if entry.manifest is not None and entry.manifest.statistics is not None:
            yield entry, entry.manifest.statistics


def _actions(examined: Examined, dim: int) -> Iterator[tuple[EntryFacts, NDArray[np.float32]]]:
    for entry in examined.entries:
        actions = entry.actions()
        if actions is not None and actions.shape[1] == dim:
            yield entry, actions
