"""Entries of the data paths: files, folders, globs."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from loader_service.shards import expand_entry, locate_entry
from stoker_proto.errors import ConfigError

PATTERNS = ("*.jsonl",)


@pytest.fixture
def demos(tmp_path: Path) -> Path:
    folder = tmp_path / "demos"
    for name in (
        "part-10.jsonl",
        "part-2.jsonl",
        "part-1.jsonl",
        "notes.txt",
        ".hidden.jsonl",
        "deep/part-3.jsonl",
        ".stoker/x.jsonl",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")
    return folder


def names(path: Path | str) -> tuple[str, ...]:
    return locate_entry(str(path), PATTERNS).names


def test_a_folder_gives_its_matching_files_in_natural_order(demos: Path) -> None:
    assert names(demos) == ("part-1.jsonl", "part-2.jsonl", "part-10.jsonl")
    assert expand_entry(str(demos), PATTERNS) == [demos / f"part-{n}.jsonl" for n in (1, 2, 10)]
    assert locate_entry(str(demos), ("**/*.jsonl",)).names == (
        "deep/part-3.jsonl",
        "part-1.jsonl",
        "part-2.jsonl",
        "part-10.jsonl",
    )


def test_a_file_is_taken_whatever_its_name(demos: Path) -> None:
    assert names(demos / "notes.txt") == ("notes.txt",)
    odd = demos / "odd[1].jsonl"
    odd.write_text("{}\n")
    assert names(odd) == ("odd[1].jsonl",)


def test_globs_are_relative_to_the_part_without_wildcards(demos: Path) -> None:
    found = locate_entry(f"{demos}/**/part-*.jsonl", PATTERNS)
    assert found.base == demos
    assert found.names == ("deep/part-3.jsonl", "part-1.jsonl", "part-2.jsonl", "part-10.jsonl")
    assert names(f"{demos}/part-[12].jsonl") == ("part-1.jsonl", "part-2.jsonl")
    assert names(f"{demos.parent}/dem*") == ("demos/part-1.jsonl", "demos/part-2.jsonl", "demos/part-10.jsonl")


def test_relative_paths_and_home(demos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demos.parent)
    assert locate_entry("demos/part-*.jsonl", PATTERNS) == locate_entry(f"{demos}/part-*.jsonl", PATTERNS)
    monkeypatch.setenv("HOME", str(demos.parent))
    assert locate_entry("~/demos", PATTERNS).paths == locate_entry(str(demos), PATTERNS).paths


def test_one_file_under_two_names_is_one_shard(demos: Path) -> None:
    (demos / "alias.jsonl").symlink_to(demos / "part-2.jsonl")
    assert expand_entry(str(demos), PATTERNS).count(demos / "part-2.jsonl") == 1


def test_links_to_nothing_are_named(demos: Path) -> None:
    (demos / "part-4.jsonl").symlink_to(demos.parent / "unmounted" / "part-4.jsonl")
    (demos / ".#part-1.jsonl").symlink_to("somebody@host.123")  # an editor's lock
    for path in (demos, f"{demos.parent}/dem*"):
        found = locate_entry(str(path), PATTERNS)
        assert found.broken == (demos / "part-4.jsonl",)
        assert [name.rpartition("/")[2] for name in found.names] == ["part-1.jsonl", "part-2.jsonl", "part-10.jsonl"]


@pytest.mark.parametrize("name", ["absent.jsonl", "deep/*.txt", "empty"])
def test_nothing_found_is_an_error_with_the_working_folder(demos: Path, name: str) -> None:
    (demos / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        expand_entry(str(demos / name), PATTERNS)
    assert str(caught.value).startswith(f"'{demos / name}' names no shard: it is no file, no folder with *.jsonl in it")
    assert str(Path.cwd()) in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "is_refused"),
    [("**/*.jsonl", True), ("*/*.jsonl", True), ("d*/part-3.jsonl", True), ("p*/*.jsonl", False), ("*.jsonl", False)],
)
def test_a_folder_that_cannot_be_listed_is_refused_where_a_glob_reaches_it(
    demos: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, is_refused: bool
) -> None:
    """Python's glob passes over it, so its shards would be missing in silence. Root may list any folder: a stand-in."""
    (demos / "parts").mkdir()
    (demos / "parts/part-4.jsonl").write_text("{}\n")
    scandir = os.scandir

    def denied(path: Any = ".") -> Any:
        if str(path).endswith(("deep", "lost+found")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    (demos / "lost+found").mkdir()
    monkeypatch.setattr(os, "scandir", denied)
    if is_refused:
        for patterns, entry in ((PATTERNS, f"{demos}/{pattern}"), ((pattern,), str(demos))):
            with pytest.raises(ConfigError, match=r"deep: this folder cannot be listed \(Permission denied\)"):
                locate_entry(entry, patterns)
    else:
        assert locate_entry(f"{demos}/{pattern}", PATTERNS).names


def test_a_folder_that_cannot_be_listed_is_refused_as_a_match_and_behind_a_link(
    demos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A glob may match the folder itself; and it follows links, one of which may lead back up."""
    scandir = os.scandir

    def denied(path: Any = ".") -> Any:
        if str(path).endswith(("deep", "linked")):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    other = demos.parent / "other"
    (other / "inner").mkdir(parents=True)
    (other / "inner/part-5.jsonl").write_text("{}\n")
    (other / "inner/up").symlink_to(other)
    assert locate_entry(f"{other}/**/*.jsonl", PATTERNS).names
    (other / "inner/linked").symlink_to(demos)
    monkeypatch.setattr(os, "scandir", denied)
    for entry, folder in (
        (f"{demos}/dee*", "deep"),
        (f"{other}/*/*/*.jsonl", "linked"),
        (f"{other}/**/*.jsonl", "linked"),
    ):
        with pytest.raises(ConfigError, match=f"{folder}: this folder cannot be listed"):
            locate_entry(entry, PATTERNS)
