"""Two runs never write into one folder; a run that ended, however it did, keeps nobody out."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from stoker_proto.errors import ConfigError
from tests.trainer.support.ranks import run_ranks
from trainer.checkpoints.lock import lock_folder, lock_output_dir
from trainer.engine.zero import join_ranks


@contextmanager
def other_run(folder: Path) -> Iterator[BaseProcess]:
    """A process that has locked the folder; it is killed at the end of the block."""
    context = multiprocessing.get_context("fork")
    locked = context.Event()

    def hold() -> None:
        lock_folder(folder)
        locked.set()
        context.Event().wait(600)

    process = context.Process(target=hold)
    process.start()
    try:
        assert locked.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.process
def test_the_other_run_is_named_and_its_end_frees_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "run"
    with other_run(folder) as other:
        with pytest.raises(ConfigError) as caught:
            lock_folder(folder)
        message = str(caught.value)
        assert f"'{folder}': process {other.pid} on host {socket.gethostname()} is training there" in message
        assert "name another trainer.output_dir" in message
        assert [path.name for path in folder.iterdir()] == ["in-use"]
    os.close(lock_folder(folder))  # the killed run's file is still there


@pytest.mark.process
def test_all_ranks_are_told_what_the_first_one_found(tmp_path: Path) -> None:
    def refused(rank: int) -> str:
        try:
            lock_output_dir(tmp_path, join_ranks())
        except ConfigError as error:
            return str(error)
        return "locked"

    with other_run(tmp_path) as other:
        first, second = run_ranks(2, refused)
    assert f"process {other.pid} on host" in first
    assert second == first
    assert run_ranks(2, refused) == ["locked", "locked"]


@pytest.mark.process
def test_an_owner_that_has_not_written_itself_down_yet(tmp_path: Path) -> None:
    with other_run(tmp_path):
        (tmp_path / "in-use").write_bytes(b"")
        with pytest.raises(ConfigError, match="another process is training there"):
            lock_folder(tmp_path)


def test_without_locks_the_run_goes_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with caplog.at_level(logging.WARNING):
        os.close(lock_folder(tmp_path))
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path / 'in-use'} cannot be locked (Operation not supported)")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run cannot be written \(Not a directory\); name another"):
        lock_folder(tmp_path / "file" / "run")


def test_a_full_disk_is_told_to_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ConfigError, which `lock_output_dir` passes on: the others wait for it."""

    def fill(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainer.checkpoints.lock.os.pwrite", fill)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/in-use cannot be written \(No space left on device\)"):
        lock_folder(tmp_path)
