"""The output folder: what is not ours stays, what is still good is kept, what is out of date goes; a disk that is full."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import pytest

from loader_service.cli import convert as command
from loader_service.convert.episode import Episode, EpisodeRef
from loader_service.convert.maniskill import ManiSkill
from loader_service.convert.rl4vla import RL4VLA
from loader_service.convert.rlds import RLDS
from loader_service.convert.run import Output, convert
from stoker_proto.errors import ConfigError, DataError
from tests.loader_service.convert.makers import (
    assert_same,
    example,
    read_all,
    record,
    rlds_features,
    write_maniskill,
    write_rl4vla,
    write_rlds,
)


@pytest.fixture
def source(tmp_path: Path) -> RL4VLA:
    """Ten files of one episode of 3 actions."""
    for number in range(10):
        write_rl4vla(tmp_path / "in" / f"e{number}.npz", record(3, number))
    return RL4VLA(inputs=(str(tmp_path / "in"),))


def times(out: Path) -> dict[str, int]:
    """When each episode was written."""
    return {folder.name: (folder / "row.json").stat().st_mtime_ns for folder in out.glob("traj_0000[01]*")}


def changed(before: dict[str, int], after: dict[str, int]) -> list[str]:
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))


def later(file: Path, content: bytes) -> None:
    """Write it so that its time differs, however coarse the file system's clock is."""
    before = file.stat().st_mtime_ns
    file.write_bytes(content)
    os.utime(file, ns=(before, before + 1_000_000_000))


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """The operating system refuses to write more bytes than this into any file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_of_somebody_else_is_left_alone(source: RL4VLA, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "train.jsonl").write_text("mine\n")
    for expected_new in (2, 0):  # also where the folder is ours, and the file is not
        with pytest.raises(
            ConfigError, match=r"holds a train\.jsonl that did not come from here: name another folder, or"
        ):
            convert(source, Output(out), jobs=1)
        assert (out / "train.jsonl").read_text() == "mine\n"
        assert convert(source, Output(out, jsonl="ours.jsonl", limit=2), jobs=1).num_new == expected_new


def test_failed_and_mended_it_goes_on(source: RL4VLA, tmp_path: Path) -> None:
    file, out = tmp_path / "in" / "e7.npz", tmp_path / "out"
    good = file.read_bytes()
    later(file, good[:500])
    with pytest.raises(DataError, match=r"e7\.npz: "):
        convert(source, Output(out), jobs=1)
    kept = times(out)
    assert len(kept) == 7
    later(file, good)
    done = convert(source, Output(out), jobs=1)
    assert (done.num_episodes, done.num_new) == (10, 3)
    assert {name: times(out)[name] for name in kept} == kept
    for number, found in enumerate(read_all(done.jsonl)):
        assert_same(found, record(3, number))


def test_what_was_recorded_anew_is_converted_anew(
    source: RL4VLA, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    convert(source, Output(out), jobs=1)
    convert(source, Output(out, limit=5, jsonl="five.jsonl"), jobs=1)
    (out / "traj_000099").mkdir()  # somebody's
    before = times(out)
    write_rl4vla(tmp_path / "new" / "e3.npz", record(3, 77))
    later(tmp_path / "in" / "e3.npz", (tmp_path / "new" / "e3.npz").read_bytes())
    write_rl4vla(tmp_path / "in" / "e8.npz", record(3, 8), instruction=" ")
    with pytest.raises(DataError, match=r"e8\.npz"):
        convert(source, Output(out), jobs=1)
    assert "what was made of 2 episodes is removed" in caplog.text
    assert not list(out.glob("*.jsonl")), "lines of one version beside the frames of another"
    done = convert(source, Output(out, skip_bad=True), jobs=1)
    assert (done.num_episodes, done.num_new, len(done.bad)) == (9, 0, 1)
    assert changed(before, times(out)) == ["traj_000003", "traj_000008"]
    expected = [record(3, seed) for seed in (0, 1, 2, 77, 4, 5, 6, 7, 9)]
    for found, one in zip(read_all(done.jsonl), expected, strict=True):
        assert_same(found, one)
    assert (out / "traj_000099").is_dir()


def test_what_moves_by_a_mended_file_is_kept(tmp_path: Path) -> None:
    """A TFRecord file that is cut gives fewer episodes: those of the files behind it keep what they have."""
    episodes = [record(3, number) for number in range(9)]
    records = [example(rlds_features(one)) for one in episodes]
    folder = write_rlds(tmp_path / "d", [records[:3], records[3:6], records[6:]])
    source, out = RLDS(inputs=(str(folder),)), tmp_path / "out"
    file = folder / "tiny-train.tfrecord-00001-of-00003"
    good = file.read_bytes()
    later(file, good[: len(good) // 3 + 50])
    done = convert(source, Output(out, skip_bad=True), jobs=1)
    assert (done.num_episodes, done.num_new) == (7, 7)
    assert len(done.bad) == 1
    assert f"{file}: record at byte {len(good) // 3}: it ends in the middle of a record" in done.bad[0]
    for found, number in zip(read_all(done.jsonl), (0, 1, 2, 3, 6, 7, 8), strict=True):
        assert_same(found, episodes[number])
    before = times(out)
    later(file, good)
    done = convert(source, Output(out, skip_bad=True), jobs=1)
    assert (done.num_episodes, done.num_new, done.bad) == (9, 3, ())
    assert changed(before, times(out)) == ["traj_000003", "traj_000004", "traj_000009"]
    for found, one in zip(read_all(done.jsonl), episodes, strict=True):
        assert_same(found, one)


def test_files_of_one_name_and_time_are_not_mixed_up(tmp_path: Path) -> None:
    """The first file's only episode was bad, so only the second one's is written; both are alike but for their content."""
    for name, good in (("a", False), ("b", True)):
        path = write_maniskill(tmp_path / name / "t.h5", [record(2, 1, extra=1)], [True])
        with h5py.File(path, "r+") as file:
            file["traj_0/actions"][0, 0] = 0.5 if good else float("nan")
        os.utime(path, ns=(10**18, 10**18))
    assert len({(tmp_path / name / "t.h5").stat().st_size for name in "ab"}) == 1
    source = ManiSkill(inputs=(str(tmp_path / "a"), str(tmp_path / "b")))
    done = convert(source, Output(tmp_path / "out", skip_bad=True), jobs=1)
    assert (done.num_episodes, done.num_new) == (1, 1)
    again = convert(source, Output(tmp_path / "out", skip_bad=True), jobs=1)
    assert (again.num_episodes, again.num_new, again.bad) == (1, 0, done.bad)
    assert str(tmp_path / "a") in again.bad[0]


def test_a_file_that_is_written_while_it_is_read(source: RL4VLA, tmp_path: Path) -> None:
    class Moving:
        episodes, identity = source.episodes, source.identity

        def read(self, ref: EpisodeRef) -> Episode:
            episode = source.read(ref)
            if ref.name == "e4":
                later(Path(ref.file), Path(ref.file).read_bytes())
            return episode

    with pytest.raises(DataError, match=r"e4\.npz: it was written again while it was read: run the command again"):
        convert(Moving(), Output(tmp_path / "out", limit=6), jobs=1)
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert convert(source, Output(tmp_path / "out", limit=6), jobs=1).num_new == 1


def test_a_full_disk_is_an_error_in_words(source: RL4VLA, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        no_room_beyond(8),
        pytest.raises(ConfigError, match=r"out: \.convert\.json cannot be written \(File too large\)"),
    ):
        convert(source, Output(out), jobs=1)
    assert [file.name for file in out.iterdir()] == [".convert.lock"]
    done = convert(source, Output(out), jobs=1)
    whole = done.jsonl.read_bytes()
    with (
        no_room_beyond(len(whole) // 2),
        pytest.raises(
            ConfigError, match=r"out: train\.jsonl cannot be written \(File too large\); run the command again"
        ),
    ):
        convert(source, Output(out), jobs=1)
    assert done.jsonl.read_bytes() == whole
    assert not list(out.glob(".*.tmp"))


def test_leftovers_of_a_killed_run_are_removed(source: RL4VLA, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, Output(out, limit=1), jobs=1)
    for name in (".train.jsonl.123.tmp", "..convert.json.123.tmp", ".mine.tmp"):
        (out / name).write_bytes(b"{")
    (out / ".traj_000001.123.tmp").mkdir()
    convert(source, Output(out, limit=1), jobs=1)
    assert sorted(file.name for file in out.glob(".*.tmp")) == [".mine.tmp"]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = command([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_bad_episodes_of_maniskill_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those that are seen while the files are listed, and a file that cannot be read at all."""
    episodes = [record(3, number, extra=1) for number in range(6)]
    path = write_maniskill(tmp_path / "in" / "a.h5", episodes, [True] * 6)
    with h5py.File(path, "r+") as file:
        del file["traj_4/obs/sensor_data/base_camera"]
    tree: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
    del tree["episodes"][1]["elapsed_steps"]
    tree["episodes"][2]["success"] = None
    path.with_suffix(".json").write_text(json.dumps(tree))
    write_maniskill(tmp_path / "in" / "b.h5", episodes, [True] * 6).write_bytes(b"not HDF5")
    common = ("maniskill", tmp_path / "in", "--jobs", 1, "--out")
    code, said = run(capsys, *common, tmp_path / "o")
    assert code == 1
    assert f"{path.with_suffix('.json')}: record episodes[1]: an episode without episode_id or elapsed_steps" in said
    assert not (tmp_path / "o").exists()
    reasons = [
        f"{path.with_suffix('.json')}: record episodes[1]: an episode without episode_id or elapsed_steps",
        f"{path}: record traj_4, field obs/sensor_data: no camera with rgb",
        f"{tmp_path / 'in' / 'b.h5'}: HDF5 that cannot be read",
    ]
    wrong = f"{path.with_suffix('.json')}: record episodes[2], field success: None: --only-success needs true or false"
    for flags, good in (([], [0, 2, 3, 5]), (["--only-success"], [0, 3, 5])):
        out = tmp_path / f"o{len(good)}"
        code, said = run(capsys, *common, out, "--skip-bad", *flags)
        assert code == 0, said
        assert f"{3 + len(flags)} bad episodes were left out:\n" in said
        for reason in [*reasons, *([wrong] if flags else [])]:
            assert f"  {reason}" in said
        for found, number in zip(read_all(out / "train.jsonl"), good, strict=True):
            assert_same(found, episodes[number], "push the cube to the goal")


@pytest.mark.process
def test_cut_tfrecord_files_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One in the middle of a record, one between two of them, which only dataset_info.json tells."""
    episodes = [record(3, number) for number in range(6)]
    records = [example(rlds_features(one)) for one in episodes]
    folder = write_rlds(tmp_path / "d", [records[:2], records[2:4], records[4:5]], lengths=["2", "2", "2"])
    file = folder / "tiny-train.tfrecord-00000-of-00003"
    file.write_bytes(file.read_bytes()[:-1])
    code, said = run(capsys, "rlds", folder, "--out", tmp_path / "o", "--jobs", 2)
    assert (code, "it ends in the middle of a record" in said) == (1, True), said
    code, said = run(capsys, "rlds", folder, "--out", tmp_path / "o", "--jobs", 2, "--skip-bad")
    assert (code, "2 bad episodes were left out" in said) == (0, True), said
    assert f"{file}: record at byte" in said
    assert "tiny-train.tfrecord-00002-of-00003: 1 records, and dataset_info.json promises 2: copy it again" in said
    for found, number in zip(read_all(tmp_path / "o" / "train.jsonl"), (0, 2, 3, 4), strict=True):
        assert_same(found, episodes[number])
