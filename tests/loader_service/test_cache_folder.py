"""The cache folder: where it lies, who may write, who waits."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from loader_service.cache_folder import cache_root, locked, save_arrays
from loader_service.prepare.run import ScanOptions, prepare
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DeadlineError
from stoker_proto.host.files import whole_folder, write_whole

MakeConfig = Callable[..., Config]
WriteShard = Callable[..., Path]


@pytest.mark.long
def test_the_cache_lies_beside_the_data_or_where_it_is_told(
    make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path
) -> None:
    shard = write_shard("d/a.jsonl", [2])
    elsewhere = write_shard("other/d/a.jsonl", [2], seed=1)
    prepare(make_config(shard, elsewhere, cache_dir=str(tmp_path / "cache")))
    assert not (shard.parent / ".stoker").exists()
    assert len(list((tmp_path / "cache").iterdir())) == 2  # two folders of one name do not mix
    prepare(make_config(shard, cache_dir=str(tmp_path / "named")))
    assert (tmp_path / "named").is_dir()
    assert not (shard.parent / ".stoker").exists()
    prepare(make_config(shard))
    assert (shard.parent / ".stoker" / ".gitignore").read_text() == "*\n"
    assert cache_root(shard.parent, None) == shard.parent / ".stoker"


def test_a_cache_that_cannot_be_written_names_the_way_out(
    make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path
) -> None:
    shard = write_shard("d/a.jsonl", [2])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError) as caught:
        prepare(make_config(shard, cache_dir=str(tmp_path / "file")))
    assert "cannot be written (Not a directory): name another one with --cache-dir or data.cache_dir" in str(
        caught.value
    )


def test_a_prepared_cache_is_only_read(make_config: MakeConfig, write_shard: WriteShard) -> None:
    shard = write_shard("d/a.jsonl", [2])
    prepare(make_config(shard))
    before = {path: path.stat().st_mtime_ns for path in (shard.parent / ".stoker").rglob("*")}
    prepare(make_config(shard))
    assert {path: path.stat().st_mtime_ns for path in (shard.parent / ".stoker").rglob("*")} == before


@pytest.mark.long
def test_a_second_loader_waits_and_finds_the_work_done(
    make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]
) -> None:
    shard = write_shard("d/a.jsonl", [2])
    config = make_config(shard)
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(prepare(config).entries["train"][0].fingerprint))
    with locked(shard.parent / ".stoker", 1.0):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert scanned == []
    thread.join(60.0)
    assert len(found) == 1
    assert scanned == ["a.jsonl"]


@pytest.mark.process
def test_two_processes_at_once_scan_the_data_once(
    make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path
) -> None:
    shard = write_shard("d/a.jsonl", [5] * 200)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{base_model_path: x}}\n"
        f"data: {{dataset_type: mani_openpi, train_data_paths: ['{shard}'], max_seq_len: 8, action: {{codec: bins}}}}\n"
        "trainer: {micro_batch_size: 1, global_batch_size: 1, lr: 1e-4}\n"
    )
    program = "import sys; from loader_service.prepare.command import main; sys.exit(main(['--config', sys.argv[1], '--json']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(config)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1]
    assert not [path for path in (shard.parent / ".stoker").rglob("*") if path.suffix == ".tmp"]


def test_waiting_ends_at_the_deadline(make_config: MakeConfig, write_shard: WriteShard) -> None:
    shard = write_shard("d/a.jsonl", [2])
    root = shard.parent / ".stoker"
    root.mkdir()
    with (root / "lock").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(DeadlineError) as caught:
            prepare(make_config(shard), scan=ScanOptions(lock_deadline_s=0.1))
    assert str(caught.value).startswith(
        f"{root / 'lock'}: another process has been scanning this data for 0.1 s; wait for it"
    )
    assert (
        prepare(make_config(shard), scan=ScanOptions(lock_deadline_s=0.1)).codec is not None
    )  # a dead process's lock is free


def test_files_and_folders_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"one")
    write_whole(tmp_path / "a", b"two")

    def fill_half() -> None:
        with whole_folder(tmp_path / "f") as folder:
            (folder / "x").write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fill_half()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with whole_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("whole")
    assert (tmp_path / "f" / "x").read_text() == "whole"
    assert (tmp_path / "a").read_bytes() == b"two"


def test_writers_of_one_file_do_not_take_each_others_temporary_one(tmp_path: Path) -> None:
    """They have one process id here, as they may have in containers that share a folder."""

    def write(number: int) -> None:
        write_whole(tmp_path / "state.json", b"%d" % number * 1000)
        save_arrays(tmp_path / "part.npz", {"x": np.arange(10)})
        with whole_folder(tmp_path / f"content-{number}") as folder:
            (folder / "a").touch()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(40)))
    names = {"state.json", "part.npz", *(f"content-{number}" for number in range(40))}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_nothing_is_left_of_what_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unwritable:
        def __array__(self, *_: object, **__: object) -> np.ndarray:
            raise OSError(28, "No space left on device")

    def half_written(path: Path, content: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        save_arrays(tmp_path / "a.npz", {"good": np.zeros(3), "bad": Unwritable()})  # type: ignore[dict-item]
    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "a.json", b"{}")
    assert list(tmp_path.iterdir()) == []
