"""`mani_openpi`: states of the row and of the NPZ, and what a config that asks for none of it gets."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.server.command import dataset_settings
from loader_service.sources.base import Sample
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.errors import DataError

Write = Callable[..., Path]
Make = Callable[..., ManiOpenPIDataset]


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)


def states_of(count: int, width: int = 3) -> np.ndarray:
    return (np.arange(count * width).reshape(count, width) / 4).astype(np.float32)


def read_only_record(dataset: ManiOpenPIDataset, shard: Path) -> list[Sample]:
    (record,) = dataset.scan(shard)
    samples = list(dataset.read(shard, record.offset, record.size))
    assert len(samples) == record.num_samples == dataset.verify(shard, record.offset, record.size)
    return samples


@pytest.mark.parametrize("extra", [0, 1])
def test_states_of_the_row(write_demo: Write, make_mani: Make, extra: int) -> None:
    states = states_of(4 + extra)
    shard = write_demo(row={"states": states.tolist()}, arrays={"rgb": frames(4), "state": states + 100})
    (shard.parent / "traj_000000" / "obs.npz").rename(shard.parent / "kept.npz")
    (record,) = make_mani(state="text").scan(shard)  # opens no NPZ
    assert record.states is not None
    assert (record.states.dtype, record.states.tolist()) == (np.float32, states[:4].tolist())
    (shard.parent / "kept.npz").rename(shard.parent / "traj_000000" / "obs.npz")
    samples = read_only_record(make_mani(state="text"), shard)
    assert [sample.state.tolist() for sample in samples if sample.state is not None] == states[:4].tolist()
    assert samples[0].state is not None
    assert samples[0].state.dtype == np.float32


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ">f8", np.int16])
@pytest.mark.parametrize(("name", "keys"), [("state", None), ("states", None), ("qpos", ["absent", "qpos"])])
def test_states_of_the_npz(
    write_demo: Write, make_mani: Make, stored: bool, dtype: Any, name: str, keys: list[str] | None
) -> None:
    states = (states_of(5) * 4).astype(dtype)
    shard = write_demo(arrays={"rgb": frames(4), name: states}, stored=stored)
    dataset = make_mani(state="text", options={"state_keys": keys} if keys else {})
    (record,) = dataset.scan(shard)
    assert record.states is not None
    assert record.states.tolist() == states[:4].tolist()
    samples = read_only_record(dataset, shard)
    assert [sample.state.tolist() for sample in samples if sample.state is not None] == states[:4].tolist()
    assert samples[0].state is not None
    assert samples[0].state.dtype == np.float32


def test_states_go_with_their_timesteps_where_noops_are_left_out(write_demo: Write, make_mani: Make) -> None:
    still, moving = [0.0] * 6 + [1.0], [0.5] + [0.0] * 5 + [1.0]
    row = {"actions": [still, moving, still, moving], "states": states_of(4).tolist()}
    shard = write_demo(row=row)
    samples = read_only_record(make_mani(drop_noops=True, state="text"), shard)
    assert [sample.state.tolist() for sample in samples if sample.state is not None] == states_of(4)[[1, 3]].tolist()


def test_nobody_reads_states_that_nobody_asked_for(write_demo: Write, make_mani: Make) -> None:
    """Files from before may hold anything under these names."""
    shard = write_demo(row={"states": "idle"}, arrays={"rgb": frames(4), "state": np.zeros((2, 2, 2))})
    (record,) = make_mani().scan(shard)
    assert record.states is None
    assert [sample.state for sample in read_only_record(make_mani(), shard)] == [None] * 4


def test_state_keys_alone_give_states_without_a_scan_of_the_npz(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo(arrays={"rgb": frames(4), "qpos": states_of(4)})
    dataset = make_mani(options={"state_keys": "qpos"})
    assert [s.state.tolist() for s in read_only_record(dataset, shard) if s.state is not None] == states_of(4).tolist()
    (shard.parent / "traj_000000" / "obs.npz").unlink()
    (record,) = dataset.scan(shard)
    assert record.states is None


NAN = float("nan")


@pytest.mark.parametrize(
    ("states", "said"),
    [
        ([[0.5]] * 3, "field states: 3 states and 4 actions: as many states, or one more, are expected"),
        ([[0.5]] * 6, "field states: 6 states and 4 actions"),
        ([[0.5], [0.5], [0.5, 1.0], [0.5]], "field states[2]: 2 numbers: a state has 1 numbers"),
        ([[0.5, 0.5], [0.5, NAN], [0.5, 1.0], [0.5]], "field states[1][1]: nan is not a finite"),
        ([[0.5], [1e39], [0.5], [0.5]], "field states[1][0]: 1e+39 is not a finite"),
        ([[0.5], ["x"], [0.5], [0.5]], "field states[1][0]: 'x': a number is expected"),
        ([0.5] * 4, "field states: [0.5, 0.5, 0.5, 0.5]: one list of numbers for each action is expected"),
        ([[]] * 4, "field states: [[], [], [], []]: one list"),
        ("idle", "field states: 'idle': one list"),
    ],
)
def test_wrong_states_of_a_row_name_line_and_field(
    write_demo: Write, make_mani: Make, states: object, said: str
) -> None:
    write_demo(row={"states": states_of(4).tolist()})
    shard = write_demo(row={"states": states})
    with pytest.raises(DataError) as caught:
        list(make_mani(state="text").scan(shard))
    assert str(caught.value).startswith(f"{shard}:2: {said}")


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (states_of(3), "field state: 3 states and 4 actions: as many states, or one more, are expected"),
        (states_of(6), "field state: 6 states and 4 actions"),
        (np.float32([[1], [2], [3], [np.inf]]), "field state[3][0]: inf is not a finite 32-bit number"),
        (np.float64([[1], [1e300], [3], [4]]), "field state[1][0]: 1e+300 is not a finite 32-bit number"),
        (np.zeros(4), "field state: shape [4]: 2 dimensions are expected"),
        (np.zeros((4, 0)), "field state: float64 [4, 0]: numbers [T, S] are expected"),
        (np.zeros((4, 2), bool), "field state: bool [4, 2]: numbers [T, S] are expected"),
        (np.zeros((4, 2), complex), "field state: complex128 [4, 2]: numbers"),
        (None, "field states: no states: the row has no `states`, and there is none of the arrays state, states, only rgb"),
    ],
)  # fmt: skip
def test_wrong_states_of_an_npz_name_file_line_and_field(
    write_demo: Write, make_mani: Make, states: np.ndarray | None, said: str
) -> None:
    shard = write_demo(arrays={"rgb": frames(4)} if states is None else {"rgb": frames(4), "state": states})
    dataset = make_mani(state="text")
    with pytest.raises(DataError) as scanned:
        list(dataset.scan(shard))
    with pytest.raises(DataError) as read:
        list(dataset.read(shard, 0, len(shard.read_bytes()) - 1))
    for caught in (scanned, read):
        assert str(caught.value).startswith(f"{shard.parent / 'traj_000000' / 'obs.npz'}: record {shard}:1, {said}")
    (record,) = make_mani(state="text", on_bad_sample="skip").scan(shard)
    assert (record.num_samples, record.error, record.states) == (4, str(scanned.value), None)


def test_verify_finds_a_flipped_bit_in_stored_states(write_demo: Write, make_mani: Make) -> None:
    states = states_of(4)
    shard = write_demo(arrays={"rgb": frames(4), "state": states}, stored=True)
    path = shard.parent / "traj_000000" / "obs.npz"
    content = bytearray(path.read_bytes())
    content[content.index(states.tobytes()) + 9] ^= 1
    path.write_bytes(content)
    dataset = make_mani(state="text")
    (record,) = dataset.scan(shard)
    with pytest.raises(DataError, match=r"field state: its CRC-32"):
        dataset.verify(shard, record.offset, record.size)


def test_a_config_without_new_options_has_the_identity_it_had(make_mani: Make, tmp_path: Path) -> None:
    """Caches and fingerprints of runs that exist hold on: these values are theirs."""
    dataset = make_mani()
    old = {"dataset_type": "mani_openpi", "options": {}, "drop_noops": False}
    tasks = "0822eb282e04da63b81f2c54623c23dbdace579654bf4cfff74ad79f119efc11"
    assert dataset_settings(dataset.config) == {**old, "chunk": 1, "depth": False}
    assert dataset.scan_identity() == {**old, "version": 1, "on_bad_sample": "fail"}
    assert dataset.read_identity() == {**dataset.scan_identity(), "chunk": 1, "depth": False, "tasks": tasks}


def test_what_changes_a_scan_or_a_sample_is_part_of_an_identity(make_mani: Make) -> None:
    scans = [make_mani(), make_mani(state="text"), make_mani(options={"state_keys": ["qpos"]})]
    reads = [
        *scans,
        make_mani(options={"camera_keys": ["rgb", "wrist"]}),
        make_mani(options={"camera_keys": ["wrist", "rgb"]}),
        make_mani(options={"image_history": [-1, 0]}),
    ]
    for identities in ([d.scan_identity() for d in scans], [d.read_identity() for d in reads]):
        for a, b in itertools.combinations([json.dumps(one) for one in identities], 2):
            assert a != b
