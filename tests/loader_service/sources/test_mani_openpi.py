"""`mani_openpi`: rows and NPZ files -> samples, and one line that names what is wrong."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loader_service.sources.base import Sample, make_dataset
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.config import DataConfig
from stoker_proto.errors import ConfigError, DataError

DEMONSTRATIONS = Path(__file__).parents[2] / "data" / "maniskill"

Write = Callable[..., Path]
Make = Callable[..., ManiOpenPIDataset]


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)


def read_only_record(dataset: ManiOpenPIDataset, shard: Path) -> list[Sample]:
    (record,) = dataset.scan(shard)
    samples = list(dataset.read(shard, record.offset, record.size))
    assert len(samples) == record.num_samples
    assert dataset.verify(shard, record.offset, record.size) == record.num_samples
    return samples


def refusal(dataset: ManiOpenPIDataset, shard: Path) -> str:
    """The error of reading the first line, as it stands, without a scan."""
    size = len(shard.read_bytes().split(b"\n")[0])
    with pytest.raises(DataError) as caught:
        list(dataset.read(shard, 0, size))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("extra", [0, 1])
def test_one_sample_per_timestep(write_demo: Write, make_mani: Make, stored: bool, extra: int) -> None:
    rgb = frames(4 + extra)
    shard = write_demo(arrays={"rgb": rgb, "qpos": np.zeros((4, 9))}, stored=stored)
    samples = read_only_record(make_mani(), shard)
    assert [sample.timestep for sample in samples] == [0, 1, 2, 3]
    assert {sample.instruction for sample in samples} == {"push the cube to the goal"}
    for t, sample in enumerate(samples):
        (image,) = sample.images
        np.testing.assert_array_equal(image, rgb[t])
        assert sample.action is not None
        assert sample.action.dtype == np.float32
        assert sample.action.tolist() == [[t / 8, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
        assert sample.answer is None


def test_real_demonstrations_are_read_as_numpy_reads_them(make_mani: Make) -> None:
    dataset = make_mani()
    shard = DEMONSTRATIONS / "val.jsonl"
    rows = [json.loads(line) for line in shard.read_text().splitlines()]
    records = list(dataset.scan(shard))
    assert len(records) == len(rows) > 0
    for row, record in list(zip(rows, records, strict=True))[:3]:
        with np.load(DEMONSTRATIONS / row["obs_path"]) as npz:
            rgb = npz["rgb"]
        samples = list(dataset.read(shard, record.offset, record.size))
        np.testing.assert_array_equal(np.stack([sample.images[0] for sample in samples]), rgb[: len(row["actions"])])
        actions = np.stack([sample.action for sample in samples if sample.action is not None])
        np.testing.assert_array_equal(actions[:, 0], np.array(row["actions"], np.float32))
        assert {sample.instruction for sample in samples} == {row["instruction"]}


def test_the_scan_counts_without_opening_an_npz(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo(num_actions=4)
    write_demo(num_actions=3, row={"instruction": "push"})
    (shard.parent / "traj_000000" / "obs.npz").unlink()
    first, second = make_mani().scan(shard)
    assert (first.offset, first.num_samples, second.num_samples) == (0, 4, 3)
    assert second.offset == first.size + 1
    assert first.actions is not None
    assert first.actions.shape == (4, 7)
    assert first.actions.dtype == np.float32


def test_depth_is_a_second_image_where_asked_for(write_demo: Write, make_mani: Make) -> None:
    depth = np.arange(4 * 8 * 6, dtype=np.uint16).reshape(4, 8, 6) * 300
    shard = write_demo(arrays={"rgb": frames(4), "depth": depth})
    assert [len(sample.images) for sample in read_only_record(make_mani(), shard)] == [1] * 4
    for t, sample in enumerate(read_only_record(make_mani(depth=True), shard)):
        assert sample.images[1].dtype == np.uint16
        np.testing.assert_array_equal(sample.images[1], depth[t])


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_what_is_not_asked_for_does_not_refuse_a_trajectory(write_demo: Write, make_mani: Make) -> None:
    """Two members of one name in the NPZ, and half a character in the row, which no JSON library but Python's takes."""
    shard = write_demo(arrays={"rgb": frames(4)})
    npz = shard.parent / "traj_000000" / "obs.npz"
    dataset = make_mani()
    [before] = dataset.scan(shard)
    with zipfile.ZipFile(npz, "a") as archive:
        archive.writestr("note.npy", b"one")
        archive.writestr("note.npy", b"two")
    shard.write_text(shard.read_text().replace('"task"', '"note": "half \\ud800 a character", "task"'))
    [after] = dataset.scan(shard)
    assert (after.error, after.num_samples) == (None, 4)
    assert before.files is not None
    assert after.files is not None
    assert after.files.content != before.files.content
    for t, sample in enumerate(read_only_record(dataset, shard)):
        np.testing.assert_array_equal(sample.images[0], frames(4)[t])


@pytest.mark.parametrize("stored", [False, True])
def test_depth_of_another_byte_order_is_read(stored: bool, write_demo: Write, make_mani: Make) -> None:
    depth = np.arange(4 * 8 * 6, dtype=np.uint16).reshape(4, 8, 6) * 300
    shard = write_demo(arrays={"rgb": frames(4), "depth": depth.astype(">u2")}, stored=stored)
    for t, sample in enumerate(read_only_record(make_mani(depth=True), shard)):
        assert sample.images[1].dtype == np.dtype(np.uint16)
        np.testing.assert_array_equal(sample.images[1], depth[t])


def test_depth_with_one_channel_is_read(write_demo: Write, make_mani: Make) -> None:
    depth = np.arange(4 * 8 * 6, dtype=np.uint16).reshape(4, 8, 6)
    shard = write_demo(arrays={"rgb": frames(4), "depth": depth[..., None]})
    for t, sample in enumerate(read_only_record(make_mani(depth=True), shard)):
        np.testing.assert_array_equal(sample.images[1], depth[t])


def test_other_names_of_the_frames(write_demo: Write, make_mani: Make) -> None:
    rgb = frames(4)
    shard = write_demo(arrays={"front": rgb, "rgb": frames(4, seed=1)})
    samples = read_only_record(make_mani(options={"rgb_keys": ["absent", "front", "rgb"]}), shard)
    np.testing.assert_array_equal(samples[2].images[0], rgb[2])


def test_chunks_of_actions(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo(num_actions=3)
    found = [sample.action for sample in read_only_record(make_mani(chunk=2), shard)]
    assert [action[:, 0].tolist() for action in found if action is not None] == [
        [0, 0.125],
        [0.125, 0.25],
        [0.25, 0.25],
    ]


def test_noops_are_left_out_with_their_images(write_demo: Write, make_mani: Make) -> None:
    still, moving = [0.0] * 6 + [1.0], [0.5] + [0.0] * 5 + [1.0]
    rgb = frames(5)
    shard = write_demo(arrays={"rgb": rgb}, row={"actions": [still, moving, still, moving, still]})
    (record,) = make_mani(drop_noops=True).scan(shard)
    assert record.actions is not None
    assert record.actions.tolist() == [moving, moving]
    samples = read_only_record(make_mani(drop_noops=True, chunk=2), shard)
    assert [sample.timestep for sample in samples] == [1, 3]
    np.testing.assert_array_equal(samples[1].images[0], rgb[3])
    assert len(read_only_record(make_mani(), shard)) == 5


def test_frames_come_one_at_a_time(write_demo: Write, make_mani: Make) -> None:
    """A stored trajectory whose last frames are missing still gives the first ones: nothing is read ahead of need."""
    shard = write_demo(stored=True)
    dataset = make_mani()
    (record,) = dataset.scan(shard)
    samples = iter(dataset.read(shard, record.offset, record.size))
    next(samples)
    path = shard.parent / "traj_000000" / "obs.npz"
    path.write_bytes(path.read_bytes()[: 400 + 8 * 6 * 3])
    with pytest.raises(DataError, match=r"obs\.npz: record .*train\.jsonl:1: it ends too early"):
        list(samples)


def test_parts_of_a_shard_give_what_the_whole_gives(write_demo: Write, make_mani: Make) -> None:
    for n in (2, 5, 3, 4, 1):
        shard = write_demo(num_actions=n)
    dataset = make_mani()
    cuts = dataset.cut(shard, 300)
    assert len(cuts) > 3
    parts = [record for a, b in itertools.pairwise(cuts) for record in dataset.scan_part(shard, a, b)]
    whole = list(dataset.scan(shard))
    assert [(r.offset, r.size, r.num_samples) for r in parts] == [(r.offset, r.size, r.num_samples) for r in whole]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"actions": [[0.0] * 7, [0.0] * 6]},
            "field actions[1]: 6 numbers: an action has 7 numbers; set",
        ),
        (
            {"actions": [[0.0] * 7, [0.0] * 6 + [float("nan")]]},
            "train.jsonl:2: field actions[1][6]: nan is not a finite",
        ),
        ({"actions": [[float("inf")] + [0.0] * 6]}, "train.jsonl:2: field actions[0][0]: inf is not a finite"),
        ({"actions": None}, "train.jsonl:2: field actions: None: a list"),
        ({"actions": []}, "train.jsonl:2: field actions: []: a list"),
        ({"obs_path": None}, "train.jsonl:2: field obs_path: None: the path of an NPZ is expected"),
        (
            {"task": "Juggle-v1"},
            "train.jsonl:2: field task: the row has no `instruction` and the task 'Juggle-v1' has none",
        ),
        ({"task": None}, "train.jsonl:2: field task: None"),
        ({"instruction": "\ud800"}, "train.jsonl:2: field instruction: '\\ud800': half of a surrogate pair"),
    ],
)
def test_the_scan_names_line_and_field(write_demo: Write, make_mani: Make, row: dict[str, Any], said: str) -> None:
    write_demo()
    shard = write_demo(row=row)
    with pytest.raises(DataError) as caught:
        list(make_mani().scan(shard))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(shard))
    assert "\n" not in str(caught.value)


def test_an_unreadable_line_is_named(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo()
    with shard.open("a") as file:
        file.write('{"obs_path": "x", "actions": [[0.1,\n')
    with pytest.raises(DataError, match=r"train\.jsonl:2: unreadable JSON \(.*\): correct or remove the line"):
        list(make_mani().scan(shard))


def test_under_policy_skip_a_bad_row_keeps_its_place(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo()
    write_demo(row={"actions": [[float("nan")] * 7] * 3})
    with shard.open("a") as file:
        file.write("{broken\n")
    write_demo(num_actions=2)
    dataset = make_mani(on_bad_sample="skip")
    records = list(dataset.scan(shard))
    assert [record.num_samples for record in records] == [4, 3, 0, 2]
    assert [record.error is None for record in records] == [True, False, False, True]
    assert "train.jsonl:2: field actions[0][0]: nan is not" in str(records[1].error)
    assert records[1].actions is None
    with pytest.raises(DataError, match=r"train\.jsonl:2: field actions\[0\]\[0\]: nan"):
        list(dataset.read(shard, records[1].offset, records[1].size))


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"rgb": frames(3)}, "field rgb: 3 images and 4 actions: as many images, or one more, are expected"),
        ({"rgb": frames(6)}, "field rgb: 6 images and 4 actions"),
        ({"rgb": frames(4).astype(np.float32)}, "field rgb: dtype float32: uint8 is expected"),
        ({"rgb": frames(4)[..., :2].copy()}, "field rgb: shape [4, 8, 6, 2]: [T, H, W, 3] is expected"),
        ({"rgb": frames(4)[:, :0].copy()}, "field rgb: shape [4, 0, 6, 3]"),
        ({"rgb": frames(4)[..., None]}, "field rgb: shape [4, 8, 6, 3, 1]: 4 dimensions are expected"),
        ({"rgb": frames(4)[0]}, "field rgb: shape [8, 6, 3]: 4 dimensions are expected"),
        (
            {"pixels": frames(4)},
            "none of the arrays rgb, image, images is there; there are pixels: name the right one in data.",
        ),
    ],
)
def test_wrong_frames_name_npz_line_and_field(
    write_demo: Write, make_mani: Make, arrays: dict[str, np.ndarray], said: str
) -> None:
    shard = write_demo(num_actions=4, arrays=arrays)
    message = refusal(make_mani(), shard)
    assert message.startswith(f"{shard.parent / 'traj_000000' / 'obs.npz'}: record {shard}:1")
    assert said in message


@pytest.mark.parametrize(
    ("depth", "said"),
    [
        (None, "none of the arrays depth is there; there are rgb: name the right one in data.options.depth_keys"),
        (np.zeros((4, 8, 6), np.float32), "field depth: dtype float32: uint16 is expected"),
        (
            np.zeros((4, 4, 6), np.uint16),
            "field depth: shape [4, 4, 6]: [T, H, W] with the size of the colour frames, [8, 6]",
        ),
        (np.zeros((3, 8, 6), np.uint16), "field depth: 3 images and 4 actions"),
    ],
)
def test_wrong_depth_is_named(write_demo: Write, make_mani: Make, depth: np.ndarray | None, said: str) -> None:
    arrays = {"rgb": frames(4)} if depth is None else {"rgb": frames(4), "depth": depth}
    shard = write_demo(arrays=arrays)
    assert said in refusal(make_mani(depth=True), shard)


def test_an_npz_outside_the_data_root_is_not_read(write_demo: Write, make_mani: Make, tmp_path: Path) -> None:
    np.savez(tmp_path / "secret.npz", rgb=frames(4))
    shard = write_demo(row={"obs_path": "../secret.npz"})
    message = refusal(make_mani(), shard)
    assert message.startswith(f"{shard}:1: field obs_path: '../secret.npz' leads outside {shard.parent}")
    samples = read_only_record(make_mani(data_root=str(tmp_path)), shard)
    assert len(samples) == 4


def test_a_missing_or_broken_npz_is_named(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo()
    path = shard.parent / "traj_000000" / "obs.npz"
    path.write_bytes(path.read_bytes()[:-30])
    assert f"{path}: record {shard}:1: its end is missing: the file was cut short" in refusal(make_mani(), shard)
    path.unlink()
    assert f"{path}: record {shard}:1: there is no such file" in refusal(make_mani(), shard)


def test_a_deflated_array_is_checked_when_its_frames_were_read(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo(arrays={"rgb": frames(4)})
    path = shard.parent / "traj_000000" / "obs.npz"
    content = bytearray(path.read_bytes())
    for mark, field in ((b"PK\x01\x02", 16), (b"PK\x03\x04", 14)):  # the CRC-32 in the directory, and before the data
        content[content.index(mark) + field] ^= 1
    path.write_bytes(content)
    dataset = make_mani()
    (record,) = dataset.scan(shard)
    read = dataset.read(shard, record.offset, record.size)
    for _ in range(4):
        next(read)
    with pytest.raises(DataError, match=r"field rgb: its CRC-32 is .* bits have flipped"):
        next(read)


def test_verify_finds_a_flipped_bit_in_stored_frames(write_demo: Write, make_mani: Make) -> None:
    rgb = frames(4)
    shard = write_demo(arrays={"rgb": rgb}, stored=True)
    path = shard.parent / "traj_000000" / "obs.npz"
    content = bytearray(path.read_bytes())
    content[content.index(rgb[1].tobytes()) + 9] ^= 4
    path.write_bytes(content)
    dataset = make_mani()
    (record,) = dataset.scan(shard)
    with pytest.raises(DataError, match=r"field rgb: its CRC-32"):
        dataset.verify(shard, record.offset, record.size)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rgb_key": "rgb"}, "data.options.rgb_key: unknown option; did you mean rgb_keys?"),
        (
            {"colour": 1},
            "data.options.colour: unknown option; mani_openpi takes action_dim, auxiliary_keys, camera_keys, "
            "depth_keys, image_history, rgb_keys, state_keys, views",
        ),
        ({"action_dim": "7"}, "data.options.action_dim is '7': a whole number of at least 1 is expected"),
        ({"action_dim": 0}, "data.options.action_dim is 0"),
        ({"rgb_keys": []}, "data.options.rgb_keys is []: a list of names"),
        ({"rgb_keys": [3]}, "data.options.rgb_keys is [3]: a list of names"),
    ],
)
def test_options_are_checked(make_mani: Make, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_mani(options=options)
    assert said in str(caught.value)


def test_noops_are_defined_for_seven_dimensions_only(make_mani: Make) -> None:
    with pytest.raises(ConfigError, match=r"data\.action\.drop_noops is on and data\.options\.action_dim is 8"):
        make_mani(options={"action_dim": 8}, drop_noops=True)


def test_another_number_of_dimensions(write_demo: Write, make_mani: Make) -> None:
    shard = write_demo(num_actions=2, row={"actions": [[0.5, 1.0], [0.25, 0.0]]})
    samples = read_only_record(make_mani(options={"action_dim": 2}), shard)
    assert samples[0].action is not None
    assert samples[0].action.tolist() == [[0.5, 1.0]]


def test_the_dataset_type_names_it(write_demo: Write) -> None:
    shard = write_demo()
    dataset = make_dataset(DataConfig(dataset_type="mani_openpi", train_data_paths=(str(shard),), max_seq_len=8))
    assert isinstance(dataset, ManiOpenPIDataset)


def test_what_read_gives_is_part_of_its_identity(make_mani: Make, tmp_path: Path) -> None:
    (tmp_path / "tasks.yaml").write_text("PickCube-v1: take the cube\n")
    variants = [
        make_mani(),
        make_mani(chunk=2),
        make_mani(depth=True),
        make_mani(drop_noops=True),
        make_mani(task_table=str(tmp_path / "tasks.yaml")),
        make_mani(options={"rgb_keys": ["rgb"]}),
    ]
    assert len({json.dumps(dataset.read_identity()) for dataset in variants}) == len(variants)


def test_a_demonstration_that_failed_is_noted(write_demo: Write, make_mani: Make) -> None:
    for row in ({"success": False}, {"success": True}, {"is_success": 0}, {}):
        shard = write_demo(row=row)
    failed = ("its row says that it did not succeed, and it is trained: remove such lines if only successes are meant",)
    assert [record.notes for record in make_mani().scan(shard)] == [failed, (), failed, ()]
