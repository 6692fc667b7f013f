"""A disk that is really full (a small tmpfs): a checkpoint or an export that does not fit is one line, and the run resumes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker_proto.config import Config
from stoker_proto.errors import HostError
from tests.trainer.support.memory import make_config
from tests.trainer.support.ranks import run_ranks
from tests.trainer.support.runs import run

pytestmark = pytest.mark.process
LEFT_BYTES = 128 << 10
"""Enough for the lock and the log, too little for weights."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: a full disk needs a file system of its own, which only root may mount")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"NOT TESTED: a tmpfs cannot be mounted here ({done.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that leaves LEFT_BYTES."""
    left = os.statvfs(disk)
    filler = disk / "filler"
    filler.write_bytes(bytes(left.f_bavail * left.f_frsize - LEFT_BYTES))
    return filler


def refusal(config: Config) -> str:
    def work(rank: int) -> str:
        with pytest.raises(HostError) as caught:
            run(config)
        return str(caught.value)

    [words] = run_ranks(1, work)
    return str(words)


def test_what_does_not_fit_is_one_line_and_the_run_resumes(disk: Path, tiny_llava: Path) -> None:
    checkpoint = {"interval": 4, "keep": 1}
    training = make_config(tiny_llava, disk, checkpoint=checkpoint, export=False)
    exporting = make_config(tiny_llava, disk, checkpoint=checkpoint, export=True)
    way_out = ": make room there, or name another trainer.output_dir; with trainer.checkpoint.resume=auto the run then resumes"
    filler = fill(disk)
    words = refusal(training)
    assert words.startswith(f"{disk}/checkpoints/step-00000004 cannot be written (")
    assert way_out in words
    assert "\n" not in words
    filler.unlink()
    run_ranks(1, lambda rank: run(training))
    assert [path.name for path in (disk / "checkpoints").glob("step-*")] == ["step-00000004"]
    filler = fill(disk)
    words = refusal(exporting)
    assert words.startswith(f"{disk}/export cannot be written (")
    assert way_out in words
    assert "\n" not in words
    filler.unlink()
    run_ranks(1, lambda rank: run(exporting))
    assert (disk / "export" / "model.safetensors").stat().st_size > LEFT_BYTES
