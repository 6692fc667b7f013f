"""Episodes: lengths, duplicates, jumps in time, quaternions, instructions.

Letters: T timesteps of an episode, S numbers of a state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from loader_service.doctor.facts import EntryFacts, Examined, RecordFacts
from loader_service.doctor.finding import Finding

_SHOWN = 5
_FEW_STEPS = 2
_SHORT = 0.2
"""Of the median length."""
_JUMP_Z = 50.0
"""Robust z of a step between timesteps: distance from the median in units of 1.4826 times the median absolute deviation."""
_JUMP_SHARE = 0.4
"""Of the dimension's range: smaller steps are no jumps, however calm the rest is."""
_UNIT, _NOT_UNIT = 0.01, 0.05
_ENOUGH = 20


def short_episodes(examined: Examined) -> Iterator[Finding]:
    """Warning: episodes of 1 or 2 samples, far shorter ones than the others, or shorter ones than an action chunk."""
    chunk = examined.config.data.action.chunk
    for entry in examined.entries:
        if entry.manifest is None or entry.dataset.is_text or not any(r.actions is not None for r in entry.records):
            continue
        lengths = np.asarray(entry.manifest.num_samples)
        filled = lengths[lengths > 0]
        if not len(filled):
            continue
        median = float(np.median(filled))
        rules = (
            (lengths > 0) & (lengths <= _FEW_STEPS),
            (lengths > _FEW_STEPS) & (lengths < _SHORT * median),
            (lengths > _FEW_STEPS) & (lengths >= _SHORT * median) & (lengths < chunk),
        )
        reasons = (
            f"of at most {_FEW_STEPS} samples",
            f"shorter than {_SHORT:.0%} of the median, {median:g} samples",
            f"shorter than a chunk of actions (data.action.chunk {chunk}): the end of every chunk is padding",
        )
        for chosen, reason in zip(rules, reasons, strict=True):
            found = np.flatnonzero(chosen).tolist()
            if found:
                problem = f"{len(found):,} of {len(filled):,} episodes are {reason}"
                way_out = "check their recordings; leave them out if they are fragments"
                yield Finding("warning", "short_episodes", entry.path, _records(found), problem, way_out)


def empty_episodes(examined: Examined) -> Iterator[Finding]:
    """Warning: records without a sample."""
    for entry in examined.entries:
        if entry.manifest is None:
            continue
        found = np.flatnonzero(entry.manifest.num_samples == 0).tolist()
        if found:
            noops = (
                ", or data.action.drop_noops removed all of their timesteps"
                if examined.config.data.action.drop_noops
                else ""
            )
            problem = f"{len(found):,} of {entry.manifest.num_records:,} records have no sample{noops}"
            yield Finding(
                "warning", "empty_episodes", entry.path, _records(found), problem, "check them, or remove them"
            )


def duplicates(examined: Examined) -> Iterator[Finding]:
    """Warning: sampled records of one split with equal content."""
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry, record in examined.records():
        if record.content:
            places[entry.split, record.content].append(f"{entry.path} record {record.record}")
    groups = [(split, same) for (split, _), same in places.items() if len(same) > 1]
    for split, same in groups[:_SHOWN]:
        problem = f"{len(same)} sampled records of {split} have equal content: {', '.join(same[:_SHOWN])}"
        yield Finding(
            "warning", "duplicates", "", "", problem, "remove the copies, which are trained more often than the others"
        )
    if len(groups) > _SHOWN:
        problem = f"{len(groups)} groups of records with equal content in all; the first {_SHOWN} are named"
        yield Finding("warning", "duplicates", "", "", problem, "remove the copies")


def train_in_val(examined: Examined) -> Iterator[Finding]:
    """Error: an entry of val is an entry of train. Warning: a sampled record of val is one of train."""
    train = [entry for entry in examined.entries if entry.split == "train" and entry.manifest is not None]
    contents = {entry.manifest.content: entry for entry in train if entry.manifest is not None}
    records = {r.content: (e, r) for e, r in examined.records() if e.split == "train" and r.content}
    for entry in examined.entries:
        if entry.split != "val" or entry.manifest is None:
            continue
        way_out = (
            "name other data for validation, or split the episodes (data.options.episodes and val_episodes of lerobot)"
        )
        if entry.manifest.content in contents:
            problem = (
                f"the same data as {contents[entry.manifest.content].key}: the validation loss says nothing of new data"
            )
            yield Finding("error", "train_in_val", entry.path, entry.key, problem, way_out)
            continue
        same = [(record, *records[record.content]) for record in entry.records if record.content in records]
        if same:
            record, other, of_train = same[0]
            problem = (
                f"{len(same)} of {len(entry.records)} sampled records are in train too, e.g. record {record.record} is record "
                f"{of_train.record} of {other.path}"
            )
            yield Finding("warning", "train_in_val", entry.path, entry.key, problem, way_out)


def jumps(examined: Examined) -> Iterator[Finding]:
    """Warning: single steps of state or action that are far larger than all others."""
    for entry in examined.entries:
        for what in ("state", "action"):
            arrays = [(r, a) for r in entry.records if (a := r.states if what == "state" else r.actions) is not None]
            widths = {array.shape[1] for _, array in arrays}
            if len(widths) == 1:
                for d in range(widths.pop()):
                    yield from _jumps(entry, what, d, [(record, array[:, d]) for record, array in arrays])


def _jumps(
    entry: EntryFacts, what: str, d: int, columns: Sequence[tuple[RecordFacts, NDArray[np.float32]]]
) -> Iterator[Finding]:
    steps = [np.abs(np.diff(column.astype(np.float64))) for _, column in columns]
    together = np.concatenate(steps)
    values = np.concatenate([column for _, column in columns])
    if len(together) < _ENOUGH or len(np.unique(values[:10_000])) <= 3:  # a switch jumps by its nature
        return
    median = np.median(together)
    deviation = 1.4826 * np.median(np.abs(together - median))
    if deviation == 0:
        return
    limit = max(median + _JUMP_Z * deviation, _JUMP_SHARE * float(np.ptp(values)))
    found = [
        (r, int(t), float(s[t])) for (r, _), s in zip(columns, steps, strict=True) for t in np.flatnonzero(s > limit)
    ]
    if found:
        record, t, step = max(found, key=lambda place: place[2])
        z = (step - median) / deviation
        problem = (
            f"{len(found)} jumps; the largest is {step:.4g} between timesteps {t} and {t + 1}, {z:.0f} robust "
            f"standard deviations from the median step {median:.4g}"
        )
        way_out = "check the recording for lost frames, wrapped angles or spliced episodes"
        yield Finding("warning", "jumps", record.file, f"record {record.record}, {what}[{d}]", problem, way_out)


def quaternions(examined: Examined) -> Iterator[Finding]:
    """Warning: four numbers of a state that are a quaternion change sign between timesteps, or are not of length 1."""
    for entry in examined.entries:
        states = [(record, record.states) for record in entry.records if record.states is not None]
        widths = {array.shape[1] for _, array in states}
        if len(widths) != 1 or sum(len(array) for _, array in states) < _ENOUGH:
            continue
        for first in _quaternion_places(np.concatenate([array for _, array in states])):
            yield from _quaternion_faults(entry, states, first)


def _quaternion_places(states: NDArray[np.float32]) -> Iterator[int]:
    """Where four neighbours have length 1 nearly always, at least three of them moving: chance does not do that."""
    first = 0
    while first + 4 <= states.shape[1]:
        four = states[:, first : first + 4].astype(np.float64)
        is_unit = np.abs(np.linalg.norm(four, axis=1) - 1) < _UNIT
        if is_unit.mean() > 0.9 and (four.std(axis=0) > 1e-4).sum() >= 3:
            yield first
            first += 3
        first += 1


def _quaternion_faults(
    entry: EntryFacts, states: Sequence[tuple[RecordFacts, NDArray[np.float32]]], first: int
) -> Iterator[Finding]:
    flips, wrong = [], []
    for record, array in states:
        four = array[:, first : first + 4].astype(np.float64)
        flips += [(record, int(t)) for t in np.flatnonzero((four[1:] * four[:-1]).sum(axis=1) < -0.5)]
        wrong += [(record, int(t)) for t in np.flatnonzero(np.abs(np.linalg.norm(four, axis=1) - 1) > _NOT_UNIT)]
    place = f"state[{first}:{first + 4}]"
    if flips:
        record, t = flips[0]
        problem = f"{len(flips)} sign flips of a quaternion, the first after timestep {t} of record {record.record}"
        way_out = "choose signs so that neighbours have a positive dot product: q and -q are one rotation, and a model sees two"
        yield Finding("warning", "quaternions", record.file, place, problem, way_out)
    if wrong:
        record, t = wrong[0]
        problem = f"{len(wrong)} quaternions are not of length 1, the first at timestep {t} of record {record.record}"
        yield Finding("warning", "quaternions", record.file, place, problem, "normalise them, or mend the recording")


def still_episodes(examined: Examined) -> Iterator[Finding]:
    """Warning: a state that never changes in an episode whose actions do."""
    for entry in examined.entries:
        found = [
            r.record
            for r in entry.records
            if _is_still(r.states) and r.actions is not None and not _is_still(r.actions)
        ]
        if found:
            problem = (
                f"the state never changes in {len(found)} of {len(entry.records)} sampled episodes, and the actions do"
            )
            yield Finding(
                "warning", "still_episodes", entry.path, _records(found), problem, "check the recording of the state"
            )


def _is_still(array: NDArray[np.float32] | None) -> bool:
    return array is not None and len(array) > _FEW_STEPS and bool((array == array[0]).all())


def instructions(examined: Examined) -> Iterator[Finding]:
    """Warning: an instruction that is missing. Note: the same one in all episodes."""
    everything: set[str] = set()
    num_records = 0
    for entry in examined.entries:
        with_action = [record for record in entry.records if record.actions is not None]
        missing = [record.record for record in with_action if any(not text.strip() for text in record.instructions)]
        if missing:
            problem = f"{len(missing)} of {len(with_action)} sampled episodes have an empty instruction"
            yield Finding(
                "warning", "instructions", entry.path, _records(missing), problem, "write what the robot does"
            )
        if entry.split == "train":
            everything.update(*(record.instructions for record in with_action))
            num_records += len(with_action)
    if len(everything) == 1 and num_records > 1:
        problem = f"the instruction is {next(iter(everything))!r} in all {num_records} sampled episodes: a model need not read it"
        yield Finding("note", "instructions", "", "", problem, "vary it if the model shall follow instructions")


def _records(numbers: Sequence[int]) -> str:
    more = "..." if len(numbers) > _SHOWN else ""
    return f"record{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_SHOWN]))}{more}"
