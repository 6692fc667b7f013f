"""Trouble of the host in loader-convert: no episode is called bad, not with --skip-bad either, and the next run resumes."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("h5py", reason="NOT TESTED: needs h5py; pip install 'stoker[convert]'")
pytest.importorskip("crc32c", reason="NOT TESTED: needs crc32c; pip install 'stoker[convert]'")

from loader_service.convert.episode import EpisodeSource
from loader_service.convert.maniskill import ManiSkill
from loader_service.convert.rl4vla import RL4VLA
from loader_service.convert.rlds import RLDS
from loader_service.convert.run import Output, convert
from stoker_proto.errors import DataError, HostError
from stoker_proto.host.trouble import host_error
from tests.loader_service.convert.makers import (
    example,
    record,
    rlds_features,
    write_maniskill,
    write_rl4vla,
    write_rlds,
)
from tests.support.failing_host import failing, raising


def episodes(kind: str, folder: Path) -> EpisodeSource:
    """Three episodes."""
    recorded = [record(3 + number, number, extra=int(kind == "maniskill")) for number in range(3)]
    if kind == "rl4vla":
        for number, one in enumerate(recorded):
            write_rl4vla(folder / f"e{number}.npz", one)
        return RL4VLA(inputs=(str(folder),))
    if kind == "maniskill":
        write_maniskill(folder / "trajectory.h5", recorded, [True] * 3)
        return ManiSkill(inputs=(str(folder),))
    write_rlds(folder, [[example(rlds_features(one)) for one in recorded]])
    return RLDS(inputs=(str(folder),), task="t", image_keys=("steps/observation/image",))


@pytest.mark.parametrize("kind", ["rl4vla", "maniskill", "rlds"])
def test_no_episode_is_bad_because_the_host_is_in_trouble(kind: str, tmp_path: Path) -> None:
    source, out = episodes(kind, tmp_path / "in"), tmp_path / "out"
    for operation, name in (("open", "EMFILE"), ("open", "EIO"), ("open", "MemoryError"), ("read", "EIO")):
        with (
            failing(tmp_path / "in", operation, raising(name)) as hit,
            pytest.raises(HostError, match="trouble of this host"),
        ):
            convert(source, Output(out, skip_bad=True), jobs=1)
        assert hit
    assert convert(source, Output(out, skip_bad=True), jobs=1).num_episodes == 3


def test_the_errno_is_found_in_the_words_of_hdf5() -> None:
    words = (
        "Can't synchronously read data (file read failed: time = Mon Nov 30, filename = 'a.h5', file descriptor = 9, "
        "errno = 5, error message = 'Input/output error', buf = 0x55, total read size = 4096, bytes this sub-read = 4096)"
    )
    assert str(host_error(OSError(words), "a.h5")).endswith("(EIO, Input/output error), no fault of the data")
    assert host_error(OSError("Unable to open file (file signature not found)")) is None


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("rl4vla", "*.npz"),
        ("maniskill", "*.h5"),
        ("maniskill", "*.json"),
        ("rlds", "*.tfrecord*"),
        ("rlds", "features.json"),
    ],
)
def test_a_git_lfs_pointer_in_the_place_of_a_recording(kind: str, pattern: str, tmp_path: Path) -> None:
    source = episodes(kind, tmp_path / "in")
    (file, *_) = sorted((tmp_path / "in").rglob(pattern))
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(DataError, match=f"{file.name}: .*a Git LFS pointer, not the file itself: run `git lfs pull`"):
        convert(source, Output(tmp_path / "out"), jobs=1)
