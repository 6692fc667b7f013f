"""File names that lead out of the data root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from loader_service.paths import resolve_inside
from loader_service.shards import expand_entry
from stoker_proto.errors import DataError


def resolve(name: object, base: Path, root: Path | None = None) -> str:
    return resolve_inside(name, base=str(base), root=str(root or base), field="obs_path")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("data", "data-private"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "obs.npz").write_bytes(b"x")
    return tmp_path / "data"


def test_names_inside_are_resolved(root: Path) -> None:
    expected = str(root / "sub" / "obs.npz")
    for name in ("sub/obs.npz", "./sub//obs.npz", "sub/../sub/obs.npz", expected):
        assert resolve(name, root) == expected
    assert resolve("../sub/obs.npz", root / "sub", root) == expected
    (root / "link.npz").symlink_to(root / "sub" / "obs.npz")
    assert resolve("link.npz", root) == expected
    (root / "folder").symlink_to(root / "sub")
    assert resolve("folder/obs.npz", root) == expected
    assert resolve(expected.removeprefix("/"), Path("/")) == expected
    assert resolve("sub/none/obs.npz", root) == str(root / "sub" / "none" / "obs.npz")


def test_the_root_may_be_a_link_or_everything(root: Path) -> None:
    alias = root.parent / "alias"
    alias.symlink_to(root)
    assert resolve("sub/obs.npz", alias) == str(root / "sub" / "obs.npz")
    assert resolve("sub/obs.npz", root, Path("/")) == str(root / "sub" / "obs.npz")


def test_names_that_lead_outside_are_refused(root: Path) -> None:
    outside = root.parent / "data-private" / "sub"
    (root / "escape").symlink_to(outside)
    (root / "escape.npz").symlink_to(outside / "obs.npz")
    for name in (
        "../data-private/sub/obs.npz",
        "sub/../../data-private/sub/obs.npz",
        str(outside / "obs.npz"),
        "/etc/passwd",
        "escape/obs.npz",
        "escape.npz",
        ".",
    ):
        with pytest.raises(DataError) as caught:
            resolve(name, root)
        assert str(caught.value) == (
            f"field obs_path: {name!r} leads outside {root}, and nothing outside the data root is read: move the file inside, "
            "or set data.data_root to a folder that holds both"
        )


@pytest.mark.parametrize("name", ["", None, 7, "a\0b", ["x"]])
def test_what_is_no_name_is_refused(root: Path, name: object) -> None:
    with pytest.raises(DataError, match="is not the path of a file"):
        resolve(name, root)


def test_a_snapshot_of_a_download_cache_holds_what_its_links_lead_to(tmp_path: Path) -> None:
    """datasets--o--n/snapshots/abc/train.jsonl -> ../../blobs/123, and NPZ files likewise."""
    repository = tmp_path / "datasets--o--n"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    (snapshot / "traj_0").mkdir(parents=True)
    blobs.mkdir()
    for name, blob in (("train.jsonl", "123"), ("traj_0/obs.npz", "456")):
        (blobs / blob).write_text("content")
        link = snapshot / name
        link.symlink_to(os.path.relpath(blobs / blob, link.parent))
    [shard] = expand_entry(str(snapshot), ["*.jsonl"])
    assert shard == snapshot / "train.jsonl"
    found = resolve_inside("traj_0/obs.npz", base=str(shard.parent), root=str(shard.parent), field="obs_path")
    assert found == str(blobs / "456")
    other = tmp_path / "datasets--o--secret" / "blobs" / "789"
    other.parent.mkdir(parents=True)
    other.write_text("content")
    (snapshot / "other.npz").symlink_to(other)
    with pytest.raises(DataError, match="leads outside"):
        resolve_inside("other.npz", base=str(snapshot), root=str(snapshot), field="obs_path")
