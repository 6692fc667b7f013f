"""Processes, interruptions, room on the disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from loader_service.convert import run as run_module
from loader_service.convert.command import main
from loader_service.convert.folder import locked
from loader_service.convert.rl4vla import RL4VLA
from loader_service.convert.run import Output, convert
from stoker_proto.errors import ConfigError, DataError
from tests.loader_service.convert.makers import assert_same, read_all, record, write_rl4vla


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that is no lock, with its content."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


@pytest.fixture
def source(tmp_path: Path) -> RL4VLA:
    """Twelve episodes of 3 to 14 actions."""
    for number in range(12):
        write_rl4vla(tmp_path / "in" / f"e{number}.npz", record(3 + number, number))
    return RL4VLA(inputs=(str(tmp_path / "in"),))


@pytest.mark.process
def test_the_result_does_not_depend_on_the_processes(source: RL4VLA, tmp_path: Path) -> None:
    one = convert(source, Output(tmp_path / "one"), jobs=1)
    three = convert(source, Output(tmp_path / "three"), jobs=3)
    assert (one.num_episodes, one.num_new, one.num_actions) == (12, 12, sum(range(3, 15)))
    assert (three.num_episodes, three.num_actions) == (12, one.num_actions)
    assert list(tree(tmp_path / "one")) == list(tree(tmp_path / "three"))
    assert (tmp_path / "one" / "train.jsonl").read_bytes() == (tmp_path / "three" / "train.jsonl").read_bytes()
    for found, number in zip(read_all(three.jsonl), range(12), strict=True):
        assert_same(found, record(3 + number, number))


def test_what_is_done_is_not_done_again(source: RL4VLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert convert(source, Output(out, limit=4), jobs=1).num_episodes == 4
    assert len((out / "train.jsonl").read_text().splitlines()) == 4
    shutil.rmtree(out / "traj_000002")
    stamps = {folder.name: folder.stat().st_mtime_ns for folder in out.glob("traj_*")}
    written: list[int] = []
    real = run_module.write_episode
    monkeypatch.setattr(run_module, "write_episode", lambda *a, **k: (written.append(a[1]), real(*a, **k)))
    again = convert(source, Output(out, limit=6), jobs=1)
    assert (written, again.num_new, again.num_episodes) == ([2, 4, 5], 3, 6)
    assert {name: (out / name).stat().st_mtime_ns for name in stamps} == stamps
    assert convert(source, Output(out, limit=6), jobs=1).num_new == 0


@pytest.mark.process
def test_killed_in_mid_run_it_goes_on(tmp_path: Path) -> None:
    """kill -9 of the parent while its processes write; nothing is half there, and nobody stays behind."""
    for number in range(40):
        write_rl4vla(tmp_path / "in" / f"e{number}.npz", record(30, number, size=(64, 64)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "loader_service.cli", "convert", "rl4vla", str(tmp_path / "in"), "--out", str(out)]
    command += ["--jobs", "2", "--trust-pickle"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(out.glob("traj_*"))) < 3:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(_session(int(entry.name)) == process.pid for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)
    done = sorted(folder.name for folder in out.glob("traj_*"))
    assert 3 <= len(done) < 40
    assert not (out / "train.jsonl").exists()
    for folder in done:
        assert len(np.load(out / folder / "obs.npz")["rgb"]) == len(
            json.loads((out / folder / "row.json").read_text())["actions"]
        )
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert f"40 episodes ({40 - len(done)} of them new)" in finished.stdout
    assert list(out.glob(".traj_*")) == []
    for found, number in zip(read_all(out / "train.jsonl"), range(40), strict=True):
        assert_same(found, record(30, number, size=(64, 64)))


def _session(process: int) -> int:
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return -1


@pytest.mark.process
def test_a_bad_episode_is_named_and_the_others_are_kept(source: RL4VLA, tmp_path: Path) -> None:
    bad = tmp_path / "in" / "e5.npz"
    good = bad.read_bytes()
    bad.write_bytes(good[: len(good) // 2])
    with pytest.raises(DataError, match=r"e5\.npz: "):
        convert(source, Output(tmp_path / "out"), jobs=2)
    assert not (tmp_path / "out" / "train.jsonl").exists()
    assert list((tmp_path / "out").glob(".traj_*")) == []
    before = len(list((tmp_path / "out").glob("traj_*")))
    assert before < 12


@pytest.mark.process
@pytest.mark.parametrize("jobs", [1, 2])
def test_bad_episodes_are_left_out_where_asked(source: RL4VLA, tmp_path: Path, jobs: int) -> None:
    """Also where the estimate looks at them: at the first one."""
    for number in (0, 5):
        (tmp_path / "in" / f"e{number}.npz").write_bytes(b"PK")
    write_rl4vla(tmp_path / "in" / "e7.npz", record(3, 7), instruction=" ")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"e0\.npz"):
        convert(source, Output(out), jobs=jobs)
    done = convert(source, Output(out, skip_bad=True), jobs=jobs)
    assert (done.num_episodes, len(done.bad)) == (9, 3)
    assert [name in reason for name, reason in zip(("e0.npz", "e5.npz", "e7.npz"), done.bad, strict=True)] == [True] * 3
    assert "an empty instruction: name a task id with --task" in done.bad[2]
    for found, number in zip(read_all(done.jsonl), [1, 2, 3, 4, 6, 8, 9, 10, 11], strict=True):
        assert_same(found, record(3 + number, number))
    again = convert(source, Output(out, skip_bad=True), jobs=jobs)
    assert (again.num_new, again.bad) == (0, done.bad)
    with pytest.raises(DataError, match=r"e0\.npz"):
        convert(source, Output(out), jobs=jobs)


def test_nothing_but_bad_episodes_is_an_error(source: RL4VLA, tmp_path: Path) -> None:
    for file in (tmp_path / "in").iterdir():
        file.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"all 12 episodes are bad; the first: .*e0\.npz"):
        convert(source, Output(tmp_path / "out", skip_bad=True), jobs=1)


def test_an_empty_instruction_leaves_the_task_to_speak(tmp_path: Path) -> None:
    write_rl4vla(tmp_path / "in" / "a.npz", record(3, 0), instruction="")
    write_rl4vla(tmp_path / "in" / "b.npz", record(3, 1))
    source = RL4VLA(inputs=(str(tmp_path / "in"),), task="PushCube-v1")
    first, second = read_all(convert(source, Output(tmp_path / "out"), jobs=1).jsonl)
    assert_same(first, record(3, 0), "push the cube to the goal")
    assert_same(second, record(3, 1))


def test_frames_are_stored_unless_asked_otherwise(source: RL4VLA, tmp_path: Path) -> None:
    import zipfile

    convert(source, Output(tmp_path / "stored", limit=1), jobs=1)
    convert(source, Output(tmp_path / "deflated", limit=1, compress=True), jobs=1)
    for name, method in (("stored", zipfile.ZIP_STORED), ("deflated", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / name / "traj_000000" / "obs.npz") as archive:
            assert [member.compress_type for member in archive.infolist()] == [method]
        assert_same(read_all(tmp_path / name / "train.jsonl")[0], record(3, 0))


def test_one_folder_holds_one_conversion(source: RL4VLA, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, Output(out, limit=2), jobs=1)
    with pytest.raises(
        ConfigError, match="holds the conversion of other files, of another version, or with other options"
    ):
        convert(source, Output(out, compress=True), jobs=1)
    write_rl4vla(tmp_path / "in" / "more.npz", record(3, 99))
    with pytest.raises(ConfigError, match="holds the conversion of other files"):
        convert(source, Output(out), jobs=1)
    (tmp_path / "mine" / "traj_000000").mkdir(parents=True)
    with pytest.raises(ConfigError, match="trajectories that did not come from here"):
        convert(source, Output(tmp_path / "mine"), jobs=1)


def test_a_full_disk_is_foreseen(source: RL4VLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    needed = sum(range(3, 15)) * 12 * 16 * 3
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: usage(1 << 40, 0, needed // 2))
    with pytest.raises(ConfigError, match=r"GB of frames are to be written, and .* has 0\.0 GB left"):
        convert(source, Output(tmp_path / "out"), jobs=1)
    assert list((tmp_path / "out").glob("traj_*")) == []
    monkeypatch.setattr(run_module.shutil, "disk_usage", lambda _: usage(1 << 40, 0, needed * 2))
    assert convert(source, Output(tmp_path / "out"), jobs=1).num_episodes == 12


def test_two_at_once(source: RL4VLA, tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ConfigError, match="another loader-convert is writing there"):
        convert(source, Output(tmp_path), jobs=1)


def test_an_episode_that_was_damaged_later_is_found(source: RL4VLA, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, Output(out, limit=2), jobs=1)
    (out / "traj_000001" / "obs.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"traj_000001/obs\.npz"):
        convert(source, Output(out, limit=2), jobs=1)


@pytest.mark.parametrize("out", [".", "made", "deep/er"])
def test_the_output_is_no_input(out: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--out .* lies in .*name a folder elsewhere"):
        main(["rl4vla", str(tmp_path), "--out", str(tmp_path / out), "--trust-pickle"])
