"""File names that lead out of the data root."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader_service.sources.paths import resolve_inside
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
