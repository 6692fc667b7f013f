"""Whole files and folders, and locks between processes."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker_proto.host.files import open_lock_file, sync_tree, try_lock, whole_file, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_whole(path, b"old")

    def fill_the_disk() -> None:
        with whole_file(path) as unfinished:
            unfinished.write_bytes(b"ne")
            assert path.read_bytes() == b"old"
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["state.json"])
    write_whole(path, b"new")
    assert (path.read_bytes(), names(tmp_path)) == (b"new", ["state.json"])


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "export"
    with whole_folder(path) as folder:
        (folder / "old").touch()
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), whole_folder(path) as folder:
        raise KeyboardInterrupt
    assert (names(tmp_path), names(path)) == (["export"], ["old"])
    with whole_folder(path) as folder:
        (folder / "new").touch()
        assert names(path) == ["old"]
    assert (names(tmp_path), names(path)) == (["export"], ["new"])


def test_what_a_killed_process_left_under_a_fixed_name_is_removed(tmp_path: Path) -> None:
    left = tmp_path / "export.partial"
    (left / "half").mkdir(parents=True)
    with whole_folder(tmp_path / "export", unfinished=left) as folder:
        assert (folder, names(folder)) == (left, [])
    assert names(tmp_path) == ["export"]


def test_everything_below_a_folder_is_synced_before_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").touch()
    synced: list[Path] = []
    monkeypatch.setattr("os.fsync", lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").readlink()))
    sync_tree(tmp_path)
    assert synced == [tmp_path / "inner" / "file", tmp_path / "inner", tmp_path]


@pytest.fixture
def lock(tmp_path: Path) -> Iterator[int]:
    descriptor = open_lock_file(tmp_path / "lock")
    yield descriptor
    os.close(descriptor)


@pytest.mark.process
def test_a_lock_ends_with_its_process(lock: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    has_it = context.Event()

    def hold() -> None:
        assert try_lock(open_lock_file(tmp_path / "lock"))
        has_it.set()
        context.Event().wait(60)

    other = context.Process(target=hold)
    other.start()
    try:
        assert has_it.wait(20)
        assert not try_lock(lock)
        assert not try_lock(lock, shared=True)
    finally:
        other.kill()
        other.join()
    assert try_lock(lock)


def test_a_shared_lock_keeps_out_exclusive_ones_only(lock: int, tmp_path: Path) -> None:
    second = open_lock_file(tmp_path / "lock")
    try:
        assert try_lock(second, shared=True)
        assert try_lock(lock, shared=True)
        assert not try_lock(lock)
    finally:
        os.close(second)
    assert try_lock(lock)
