"""Folders of killed loaders are removed, by however many loaders at once; all others stay."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from loader_service.server.run_directory import run_directory

pytestmark = pytest.mark.process


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_loaders_left_is_removed_and_nothing_else(base: Path) -> None:
    left = base / f"stoker-loader-{dead_process()}-abc"
    others = {
        f"stoker-loader-{os.getppid()}-abc",  # it lives
        "stoker-loader-99999999999999999999-abc",
        "stoker-loader-²-abc",
        "stoker-loader-",
        "other",
    }
    for name in {left.name, *others}:
        (base / name).mkdir()
    (left / "plan.npy").write_bytes(b"x")
    with run_directory() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.name for path in base.iterdir()} == others | {folder.name}
    assert {path.name for path in base.iterdir()} == others


def test_loaders_that_start_together_after_a_crash_all_start(base: Path) -> None:
    owner, together, failures = dead_process(), threading.Barrier(4), []

    def start() -> None:
        together.wait(60)
        try:
            with run_directory():
                pass
        except OSError as error:
            failures.append(error)

    for _ in range(10):
        for number in range(20):
            (base / f"stoker-loader-{owner}-{number}").mkdir()
        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert list(base.iterdir()) == []
