"""Each check of the doctor on facts that make it speak, and on facts that keep it quiet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loader_service.doctor.facts import CameraFacts, EntryFacts, Examined, RecordFacts, RowFacts
from loader_service.doctor.finding import Finding
from loader_service.doctor.registry import CHECKS, check
from loader_service.manifest import EntryManifest
from loader_service.sources.base import Turn, make_dataset
from stoker_proto.actions import ActionStatistics, fit_codec
from stoker_proto.config import ActionConfig, LoaderConfig, SourceConfig
from tests.loader_service.doctor.made import a_config, a_manifest, statistics

RANDOM = np.random.default_rng(0)
ACTIONS = RANDOM.uniform(-1, 1, (60, 3)).astype(np.float32)
STATES = np.cumsum(RANDOM.uniform(-0.1, 0.1, (60, 3)), axis=0).astype(np.float32)


def a_record(number: int = 0, **facts: Any) -> RecordFacts:
    return RecordFacts(**{"file": "demos", "record": number, "offset": 0, "size": 1, **facts})


def an_entry(*records: RecordFacts, manifest: EntryManifest | None = None, **facts: Any) -> EntryFacts:
    given = {
        "split": "train", "entry": 0, "key": "data.train_data_paths[0]", "path": "demos", "source": 0,
        "dataset": make_dataset(a_config().data), "manifest": manifest, "records": list(records),
    }  # fmt: skip
    return EntryFacts(**{**given, **facts})


def examined(*entries: EntryFacts, **facts: Any) -> Examined:
    return Examined(**{"config": a_config(), "entries": list(entries), **facts})


def found(name: str, facts: Examined) -> list[Finding]:
    findings = list(check(name)(facts))
    assert {finding.check for finding in findings} <= {name}
    return findings


def with_column(array: Any, d: int, column: Any) -> Any:
    changed = array.copy()
    changed[:, d] = column
    return changed


def of_actions(actions: Any, **facts: Any) -> Examined:
    return examined(an_entry(a_record(actions=actions), manifest=a_manifest([len(actions)], actions)), **facts)


def codec_of(known: ActionStatistics, sample: Any = ACTIONS) -> Any:
    return fit_codec("bins", np.asarray(sample, np.float32), known, chunk=1)


def of_codec(actions: Any, known: ActionStatistics) -> Examined:
    """As after reading: the round trip of each action through the codec."""
    codec = codec_of(known, actions)
    pairs = list(zip(actions[:, None], codec.decode(codec.encode(actions[:, None])), strict=True))
    entry = an_entry(a_record(actions=actions, round_trip=pairs), manifest=a_manifest([len(actions)], actions))
    return examined(entry, codec=codec)


def of_states(states: Any, **facts: Any) -> Examined:
    return examined(an_entry(a_record(states=np.asarray(states, np.float32), **facts)))


def of_lengths(*lengths: int) -> Examined:
    return examined(an_entry(a_record(actions=ACTIONS), manifest=a_manifest(list(lengths))))


def of_camera(**facts: int) -> Examined:
    return examined(an_entry(a_record(cameras=[CameraFacts(sizes={(64, 64)}, **{"num_frames": 10, **facts})])))


def of_sizes(*sizes: set[tuple[int, int]]) -> Examined:
    return examined(an_entry(a_record(cameras=[CameraFacts(sizes=found, num_frames=10) for found in sizes])))


def a_row(tokens: int = 20, labels: int = 5, last: int | None = 2) -> RowFacts:
    return RowFacts(num_tokens=tokens, num_labels=labels, last_label=last, is_answer=True)


def of_rows(*rows: RowFacts, **facts: Any) -> Examined:
    return examined(an_entry(*(a_record(number, rows=[row]) for number, row in enumerate(rows))), **facts)


def dialogue(answer: str) -> tuple[Turn, ...]:
    return Turn(role="user", text="Hi"), Turn(role="assistant", text=answer, learned=True)


def of_split(train: str, val: str, *, contents: tuple[str, str] = ("a", "b")) -> Examined:
    return examined(
        an_entry(a_record(content=train), manifest=a_manifest([1], content=contents[0])),
        an_entry(a_record(7, content=val), manifest=a_manifest([1], content=contents[1]), split="val"),
    )


def of_mixture(small: int, large: int, weights: tuple[float, float] | None = None) -> Examined:
    sources = tuple(
        SourceConfig(dataset_type="mani_openpi", paths=(name,), name=name, weight=weights[n] if weights else None)
        for n, name in enumerate(("small", "large"))
    )
    entries = [an_entry(manifest=a_manifest([size]), source=n) for n, size in enumerate((small, large))]
    return examined(*entries, config=a_config(dataset_type="", sources=sources))


class _Processor:
    """Stands where `stop_token` asks only whether there is one."""


QUATERNIONS = np.stack([np.cos(a := np.linspace(0.2, 1.2, 40)), np.sin(a) * 0.6, np.sin(a) * 0.8, 0 * a], axis=1)
FLIPPED = np.concatenate([QUATERNIONS[:20], -QUATERNIONS[20:]])
DENTED = np.concatenate([QUATERNIONS[:39], QUATERNIONS[39:] * 0.5])
TURNING = {"processor": _Processor(), "stop_ids": frozenset({2})}

SPEAKS: list[tuple[str, Examined, str, str, str]] = [
    (
        "disk_cache",
        examined(config=replace(a_config(), loader=LoaderConfig(disk_cache_gb=1, disk_cache_dir="/dev/null/cache"))),
        "error",
        "",
        "loader.disk_cache_dir: /dev/null/cache cannot be written (Not a directory)",
    ),
    (
        "round_trip",
        of_codec(
            with_column(ACTIONS, 2, np.linspace(0, 850, 60)),
            statistics(with_column(ACTIONS, 2, np.linspace(0, 850, 60)), [True, True, False]),
        ),
        "error",
        "action[2]",
        "49.9% of the range 850",
    ),
    (
        "round_trip",
        of_codec(ACTIONS, statistics(ACTIONS * [0.5, 1, 1])),
        "warning",
        "action[0]",
        "and 5.0% is the limit",
    ),
    (
        "dead_dimensions",
        of_actions(with_column(ACTIONS, 1, 0.5)),
        "warning",
        "action[1]",
        "the value is 0.5 in all 60 actions",
    ),
    (
        "dead_dimensions",
        examined(an_entry(manifest=a_manifest([300], np.append(np.zeros(299), 1)[:, None]))),
        "warning",
        "action[0]",
        "q01 = q99 = 0, and values reach from 0 to 1",
    ),
    (
        "dead_dimensions",
        of_states(with_column(STATES, 1, -1)),
        "warning",
        "state[1]",
        "the value is -1 in all 60 sampled states",
    ),
    (
        "clamped",
        of_codec(ACTIONS, statistics(ACTIONS * [0.1, 1, 1])),
        "error",
        "action[0]",
        "of 60 sampled values are clamped",
    ),
    (
        "clamped",
        of_codec(ACTIONS, statistics(ACTIONS * [0.7, 1, 1])),
        "warning",
        "action[0]",
        "of 60 sampled values are clamped",
    ),
    (
        "unmasked_range",
        of_codec(ACTIONS * 9, statistics(ACTIONS * 9, [True, True, False])),
        "error",
        "action[2]",
        "in a dimension that is not normalised",
    ),
    ("gripper", of_actions(with_column(ACTIONS, 2, np.arange(60) % 2)), "note", "action[2]", "only the values 0 and 1"),
    (
        "gripper",
        of_actions(with_column(ACTIONS, 2, np.arange(60) % 2 * 2 - 1)),
        "note",
        "action[2]",
        "only the values -1 and 1",
    ),
    (
        "gripper",
        of_actions(with_column(ACTIONS, 2, np.linspace(0, 850, 60))),
        "note",
        "action[2]",
        "reaches from 0 to 850",
    ),
    (
        "saturated",
        of_actions(with_column(ACTIONS, 0, np.minimum(np.arange(60), 15))),
        "warning",
        "action[0]",
        "75.0% of 60 sampled values are the maximum, 15",
    ),
    ("short_episodes", of_lengths(30, 2, 30), "warning", "record 1", "1 of 3 episodes are of at most 2 samples"),
    (
        "saturated",
        of_states(np.minimum(np.arange(40), 9)[:, None]),
        "warning",
        "state[0]",
        "77.5% of 40 sampled values are the maximum, 9",
    ),
    (
        "short_episodes",
        of_lengths(30, 30, 30, 5),
        "warning",
        "record 3",
        "1 of 4 episodes are shorter than 20% of the median, 30 samples",
    ),
    ("empty_episodes", of_lengths(3, 0, 3), "warning", "record 1", "1 of 3 records have no sample"),
    (
        "duplicates",
        examined(an_entry(a_record(3, content="x"), a_record(4, content="x"))),
        "warning",
        "",
        "demos record 3, demos record 4",
    ),
    (
        "train_in_val",
        of_split("x", "y", contents=("a", "a")),
        "error",
        "data.train_data_paths[0]",
        "the same data as data.train_data_paths[0]",
    ),
    ("train_in_val", of_split("x", "x"), "warning", "data.train_data_paths[0]", "record 7 is record 0 of demos"),
    (
        "jumps",
        of_states(STATES + np.repeat([[0, 0, 0], [0, 90, 0]], 30, axis=0)),
        "warning",
        "record 0, state[1]",
        "between timesteps 29 and 30",
    ),
    (
        "quaternions",
        of_states(FLIPPED),
        "warning",
        "state[0:4]",
        "1 sign flips of a quaternion, the first after timestep 19 of record 0",
    ),
    (
        "quaternions",
        of_states(DENTED),
        "warning",
        "state[0:4]",
        "1 quaternions are not of length 1, the first at timestep 39",
    ),
    (
        "still_episodes",
        of_states(STATES * 0, actions=ACTIONS),
        "warning",
        "record 0",
        "the state never changes in 1 of 1 sampled episodes",
    ),
    (
        "instructions",
        examined(an_entry(a_record(actions=ACTIONS, instructions={" "}))),
        "warning",
        "record 0",
        "1 of 1 sampled episodes have an empty instruction",
    ),
    (
        "instructions",
        examined(an_entry(*(a_record(n, actions=ACTIONS, instructions={"push"}) for n in range(3)))),
        "note",
        "",
        "the instruction is 'push' in all 3",
    ),
    (
        "constant_frames",
        of_camera(num_constant=6, num_black=6),
        "warning",
        "record 0, image 0",
        "6 of 10 frames are black",
    ),
    ("constant_frames", of_camera(num_constant=6), "warning", "record 0, image 0", "6 of 10 frames are of one colour"),
    ("frozen_frames", of_camera(num_repeated=9), "warning", "record 0, image 0", "all 10 frames are equal"),
    ("frame_sizes", of_sizes({(64, 64), (48, 64)}), "warning", "image 0", "48x64, 64x64"),
    ("frame_sizes", of_sizes({(64, 64)}, {(48, 64)}), "note", "", "image 0 64x64; image 1 48x64"),
    (
        "camera_counts",
        examined(an_entry(a_record(0, cameras=[CameraFacts()]), a_record(1))),
        "warning",
        "",
        "record 1 has 0 images, record 0 has 1 images",
    ),
    (
        "empty_answers",
        examined(an_entry(a_record(turns=dialogue("\n")))),
        "warning",
        "record 0",
        "1 of 1 sampled dialogues have an empty answer",
    ),
    (
        "no_labels",
        of_rows(a_row(), a_row(labels=0, last=None)),
        "error",
        "record 1",
        "1 of 2 sampled records have a row without a label",
    ),
    (
        "stop_token",
        of_rows(a_row(), a_row(last=9), **TURNING),
        "warning",
        "record 1",
        "of 1 of 2 rows, e.g. id 9, is none at which generation stops (2)",
    ),
    (
        "cut_dialogues",
        examined(an_entry(a_record(turns=dialogue("x"), rows=[a_row(64)])), config=a_config(overlong="truncate")),
        "warning",
        "record 0",
        "1 of 1 sampled dialogues fill all 64 tokens",
    ),
    (
        "long_rows",
        of_rows(*[a_row(5)] * 11, a_row(60)),
        "note",
        "",
        "the longest of 12 sampled rows has 60 tokens, the median 5",
    ),
    (
        "special_tokens",
        examined(an_entry(a_record(texts=["Hi </s> there"])), special_tokens=("<s>", "</s>")),
        "warning",
        "record 0",
        "read as plain text: </s>",
    ),
    ("imbalance", of_mixture(10, 1001), "note", "", "large has 1,001 samples and small 10"),
    ("imbalance", of_mixture(10, 1100, (1.0, 1.0)), "note", "", "small (10 samples) repeats 110 times while large"),
]

QUIET: list[tuple[str, Examined]] = [
    ("disk_cache", examined()),
    ("dead_dimensions", of_actions(ACTIONS)),
    ("dead_dimensions", of_states(STATES)),
    ("clamped", of_codec(ACTIONS, statistics(ACTIONS))),
    ("unmasked_range", of_codec(ACTIONS, statistics(ACTIONS, [True, True, False]))),
    ("gripper", of_actions(ACTIONS)),
    ("saturated", of_actions(ACTIONS)),
    ("saturated", of_states(STATES)),
    ("short_episodes", of_lengths(30, 31, 29)),
    ("empty_episodes", of_lengths(3, 3)),
    ("duplicates", examined(an_entry(a_record(3, content="x"), a_record(4, content="y"), a_record(5), a_record(6)))),
    ("train_in_val", of_split("x", "y")),
    ("jumps", of_states(STATES)),
    ("jumps", of_states(with_column(STATES, 1, np.arange(60) > 30))),
    ("quaternions", of_states(QUATERNIONS)),
    ("quaternions", of_states(ACTIONS)),
    ("still_episodes", of_states(STATES, actions=ACTIONS)),
    ("still_episodes", of_states(STATES * 0, actions=ACTIONS * 0)),
    ("instructions", examined(an_entry(*(a_record(n, actions=ACTIONS, instructions={f"push {n}"}) for n in range(3))))),
    ("constant_frames", of_camera(num_constant=5)),
    ("frozen_frames", of_camera(num_repeated=8)),
    ("frozen_frames", of_camera(num_repeated=9, num_constant=10)),
    ("frame_sizes", of_sizes({(64, 64)}, {(64, 64)})),
    ("camera_counts", examined(an_entry(a_record(0, cameras=[CameraFacts()]), a_record(1, cameras=[CameraFacts()])))),
    ("empty_answers", examined(an_entry(a_record(turns=dialogue("Hello"))))),
    ("no_labels", of_rows(a_row())),
    ("stop_token", of_rows(a_row(), a_row(64, last=9), **TURNING)),
    (
        "cut_dialogues",
        examined(an_entry(a_record(turns=dialogue("x"), rows=[a_row(63)])), config=a_config(overlong="truncate")),
    ),
    ("long_rows", of_rows(*[a_row(20)] * 11, a_row(60))),
    ("special_tokens", examined(an_entry(a_record(texts=["Hi <b> there"])), special_tokens=("<s>", "</s>"))),
    ("imbalance", of_mixture(10, 1000)),
    ("imbalance", of_mixture(10, 1000, (1.0, 100.0))),
    ("fingerprints", examined()),
]


@pytest.mark.parametrize(("name", "facts", "severity", "where", "problem"), SPEAKS)
def test_it_speaks(name: str, facts: Examined, severity: str, where: str, problem: str) -> None:
    findings = [finding for finding in found(name, facts) if finding.severity == severity]
    assert [finding.where for finding in findings] == [where], findings
    assert problem in findings[0].problem


@pytest.mark.parametrize(("name", "facts"), QUIET)
def test_it_is_quiet(name: str, facts: Examined) -> None:
    assert found(name, facts) == []


def test_a_good_round_trip_is_a_note_with_its_figures() -> None:
    (note,) = found("round_trip", of_codec(ACTIONS, statistics(ACTIONS)))
    assert note.severity == "note"
    assert note.problem.startswith("mean error per dimension of 60 chunks, in action units: 0.00")


def test_episodes_shorter_than_a_chunk() -> None:
    facts = of_lengths(9, 30)
    assert found("short_episodes", facts) == []
    facts.config = a_config(action=ActionConfig(codec="bins", chunk=16))
    (finding,) = found("short_episodes", facts)
    assert finding.where == "record 0"
    assert "shorter than a chunk of actions (data.action.chunk 16)" in finding.problem


def test_every_check_has_a_test_that_makes_it_speak() -> None:
    of_files = {
        "fingerprints",
        "timestamps",
        "brief_episodes",
        "video_frames",
        "published_statistics",
    }  # test_command.py
    assert {name for name, *_ in SPEAKS} | of_files == set(CHECKS)
    assert {name for name, _ in QUIET} | of_files | {"round_trip"} == set(CHECKS)
