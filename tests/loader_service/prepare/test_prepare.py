"""`prepare`: what a manifest holds, when it is made anew, and when it is the same."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from loader_service.manifest import EntryManifest
from loader_service.prepare import parts as parts_module
from loader_service.prepare import scan_pool
from loader_service.prepare.run import Prepared, ScanOptions, prepare
from loader_service.sources.base import ScannedRecord
from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.actions import save_codec
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, DataError
from tests.tiny_models import cached_in

MakeConfig = Callable[..., Config]
WriteShard = Callable[..., Path]


def columns(manifest: EntryManifest) -> list[list[int]]:
    return np.stack([manifest.shard_index, manifest.offsets, manifest.sizes, manifest.num_samples], 1).tolist()


def the_entry(prepared: Prepared) -> EntryManifest:
    return prepared.entries["train"][0]


def result(prepared: Prepared) -> tuple[str, list[list[int]], str]:
    """Fingerprint, columns and the codec's fingerprint, copied out of the files."""
    assert prepared.codec is not None
    entry = the_entry(prepared)
    return entry.fingerprint, columns(entry), prepared.codec.fingerprint


def test_a_manifest_has_a_row_per_record(make_config: MakeConfig, write_shard: WriteShard) -> None:
    first, second = write_shard("d/b-2.jsonl", [3, 1]), write_shard("d/b-10.jsonl", [4], seed=1)
    val = write_shard("v/val.jsonl", [2, 2], seed=2)
    prepared = prepare(make_config(first.parent, val=[val]))
    entry = the_entry(prepared)
    lines = [len(line) for line in first.read_text().splitlines()]
    assert entry.shards == (str(first), str(second))
    assert columns(entry) == [
        [0, 0, lines[0], 3],
        [0, lines[0] + 1, lines[1], 1],
        [1, 0, len(second.read_text()) - 1, 4],
    ]
    assert (entry.num_records, entry.total_samples, entry.num_bad) == (3, 8, 0)
    assert (entry.split, entry.entry, entry.path) == ("train", 0, str(first.parent))
    assert [column.dtype for column in (entry.shard_index, entry.offsets, entry.sizes, entry.num_samples)] == [
        np.uint32,
        np.int64,
        np.uint32,
        np.uint32,
    ]
    assert prepared.entries["val"][0].total_samples == 4
    actions = np.array(
        [a for file in (first, second) for row in file.read_text().splitlines() for a in json.loads(row)["actions"]]
    )
    assert prepared.statistics is not None
    assert prepared.statistics.count == 8
    np.testing.assert_allclose(prepared.statistics.mean, actions.mean(0), atol=1e-6)
    np.testing.assert_allclose(prepared.statistics.max, actions.max(0), atol=1e-6)
    np.testing.assert_allclose(prepared.statistics.q99, np.quantile(actions, 0.99, axis=0), atol=1e-6)
    assert prepared.statistics.mask.tolist() == [True] * 6 + [False]
    assert prepared.entries["val"][0].statistics.count == 4


def test_columns_are_mapped_files_in_every_process(make_config: MakeConfig, write_shard: WriteShard) -> None:
    entry = the_entry(prepare(make_config(write_shard("d/a.jsonl", [3] * 50))))
    assert isinstance(entry.offsets.base, np.memmap)
    pickled = pickle.dumps(entry)
    assert len(pickled) < 2000
    again = pickle.loads(pickled)  # noqa: S301 - our own, from the line above
    assert columns(again) == columns(entry)
    assert (again.fingerprint, again.shards, again.split) == (entry.fingerprint, entry.shards, "train")


def test_nothing_is_scanned_twice(make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]) -> None:
    config = make_config(write_shard("d/a.jsonl", [3, 4]))
    before = prepare(config)
    assert scanned == ["a.jsonl"]
    scanned.clear()
    assert result(prepare(config)) == result(before)
    assert scanned == []


def test_only_a_changed_shard_is_scanned_again(
    make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]
) -> None:
    shards = [write_shard(f"d/{name}.jsonl", [3, 4], seed=seed) for seed, name in enumerate("abc")]
    config = make_config(shards[0].parent)
    before = prepare(config)
    scanned.clear()
    write_shard("d/b.jsonl", [3, 4], seed=9)
    changed = prepare(config)
    assert scanned == ["b.jsonl"]
    assert the_entry(changed).fingerprint != the_entry(before).fingerprint
    assert changed.codec is not None
    assert before.codec is not None
    assert changed.codec.fingerprint != before.codec.fingerprint
    scanned.clear()
    write_shard("d/d.jsonl", [5], seed=4)
    assert the_entry(prepare(config)).num_records == 7
    assert scanned == ["d.jsonl"]
    scanned.clear()
    shards[0].unlink()
    assert the_entry(prepare(config)).num_records == 5
    assert scanned == []


def test_a_change_of_equal_size_and_time_is_found(make_config: MakeConfig, write_shard: WriteShard) -> None:
    """The modification time can be set back; the time of the last status change cannot."""
    shard = write_shard("d/a.jsonl", [3])
    status = shard.stat()
    before = prepare(make_config(shard))
    text = shard.read_text()
    shard.write_text(text.replace("PushCube-v1", "PullCube-v1"))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert the_entry(prepare(make_config(shard))).fingerprint != the_entry(before).fingerprint


def test_files_touched_without_a_change_are_hashed_not_scanned(
    make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]
) -> None:
    shard = write_shard("d/a.jsonl", [3, 4])
    before = prepare(make_config(shard))
    scanned.clear()
    folder = the_entry(before).folder.stat().st_ino
    os.utime(shard, (1, 1))
    after = prepare(make_config(shard))
    assert scanned == []
    assert result(after) == result(before)
    assert the_entry(after).folder.stat().st_ino == folder  # other loaders may be reading these columns


def test_the_same_data_elsewhere_has_the_same_fingerprint(
    make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path
) -> None:
    shard = write_shard("here/a.jsonl", [3, 4])
    (tmp_path / "there").mkdir()
    shutil.copy(shard, tmp_path / "there" / "a.jsonl")
    here, there = prepare(make_config(shard)), prepare(make_config(tmp_path / "there" / "a.jsonl"))
    assert result(here) == result(there)
    assert the_entry(there).shards == (str(tmp_path / "there" / "a.jsonl"),)


def test_a_moved_folder_keeps_its_manifest(
    make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path, scanned: list[str]
) -> None:
    shard = write_shard("here/a.jsonl", [3, 4])
    before = prepare(make_config(shard))
    scanned.clear()
    shard.parent.rename(tmp_path / "there")
    after = prepare(make_config(tmp_path / "there" / "a.jsonl"))
    assert scanned == []
    assert the_entry(after).fingerprint == the_entry(before).fingerprint
    assert the_entry(after).shards == (str(tmp_path / "there" / "a.jsonl"),)


def test_what_read_gives_is_in_the_fingerprint_but_needs_no_new_scan(
    make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]
) -> None:
    shard = write_shard("d/a.jsonl", [3, 4])
    plain = the_entry(prepare(make_config(shard)))
    scanned.clear()
    chunked = the_entry(prepare(make_config(shard, action={"chunk": 4})))
    assert scanned == []
    assert (chunked.content, chunked.folder) == (plain.content, plain.folder)
    assert chunked.fingerprint != plain.fingerprint
    dropped = the_entry(prepare(make_config(shard, action={"drop_noops": True})))
    assert scanned == ["a.jsonl"]
    assert dropped.content != plain.content


def test_an_interrupted_scan_goes_on_where_it_was(
    make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]
) -> None:
    for name in ("a", "b"):
        write_shard(f"d/{name}.jsonl", [3, 4], seed=ord(name))
    bad = write_shard("d/c.jsonl", [2])
    good = bad.read_text()
    bad.write_text(good + "{broken\n")
    config = make_config(bad.parent)
    with pytest.raises(DataError, match=r"c\.jsonl:2: unreadable JSON"):
        prepare(config)
    bad.write_text(good)
    scanned.clear()
    assert the_entry(prepare(config)).num_records == 5
    assert scanned == ["c.jsonl"]


@pytest.mark.long
@pytest.mark.parametrize("file", ["manifest.json", "offsets.npy", "actions.npz", "state.json", "parts", "codecs"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_cache_is_made_anew(make_config: MakeConfig, write_shard: WriteShard, file: str, damage: str) -> None:
    shard = write_shard("d/a.jsonl", [3, 4])
    before = result(prepare(make_config(shard)))
    root = shard.parent / ".stoker"
    (path,) = root.glob(f"{file}/**/*.*") if file in ("parts", "codecs") else root.glob(f"**/{file}")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if damage == "cut" else b"{}")
    if file == "actions.npz":  # read only when a codec is fitted
        shutil.rmtree(root / "codecs")
    assert result(prepare(make_config(shard))) == before


@pytest.mark.process
def test_the_number_of_processes_and_parts_changes_nothing_but_the_speed(
    make_config: MakeConfig, write_shard: WriteShard, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parts_module, "PART_BYTES", 20_000)
    monkeypatch.setattr(scan_pool, "MIN_POOL_BYTES", 0)
    write_shard("d/a.jsonl", [20] * 60)
    shard = write_shard("d/b.jsonl", range(1, 40), seed=1)
    config = make_config(shard.parent, action={"codec": "vq", "codec_options": {"codebook_size": 16, "levels": 2}})
    one = prepare(cached_in(tmp_path / "one", config), scan=ScanOptions(processes=1))
    two = prepare(cached_in(tmp_path / "two", config), scan=ScanOptions(processes=2))
    assert len(list((tmp_path / "one").glob("*/parts/*/*.npz"))) > 5
    assert result(one) == result(two)
    monkeypatch.setattr(parts_module, "PART_BYTES", 16 << 20)
    whole = prepare(cached_in(tmp_path / "whole", config))
    assert columns(the_entry(whole)) == columns(the_entry(one))
    assert whole.statistics is not None
    assert one.statistics is not None
    assert whole.statistics.to_json() == one.statistics.to_json()


@pytest.mark.process
def test_of_several_errors_the_first_is_told(
    make_config: MakeConfig, write_shard: WriteShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_pool, "MIN_POOL_BYTES", 0)
    for name in "abcd":
        path = write_shard(f"d/{name}.jsonl", [2])
        if name in "bd":
            path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(DataError) as caught:
        prepare(make_config(path.parent), scan=ScanOptions(processes=2))
    assert str(caught.value).startswith(f"{path.parent / 'b.jsonl'}:2: unreadable JSON")


def test_data_named_twice_is_scanned_once(make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]) -> None:
    shard = write_shard("d/a.jsonl", [3, 4])
    prepared = prepare(make_config(shard, shard, val=[shard]))
    assert scanned == ["a.jsonl"]
    assert {entry.fingerprint for entries in prepared.entries.values() for entry in entries.values()} == {
        the_entry(prepared).fingerprint
    }
    assert sorted(prepared.entries["train"]) == [0, 1]


def test_only_held_entries_are_prepared(make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path) -> None:
    config = make_config(
        write_shard("d/a.jsonl", [3]), tmp_path / "absent", action={"codec_path": str(tmp_path / "c.json")}
    )
    with pytest.raises(ConfigError, match=r"data\.action\.codec_path: .*c\.json: no action codec can be read here"):
        prepare(config, held={"train": [0]})
    full = prepare(make_config(write_shard("d/a.jsonl", [3])))
    assert full.codec is not None
    save_codec(full.codec, tmp_path / "c.json")
    prepared = prepare(config, held={"train": [0], "val": []})
    assert list(prepared.entries["train"]) == [0]
    assert prepared.entries["val"] == {}
    assert prepared.codec is not None
    assert prepared.codec.fingerprint == full.codec.fingerprint


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_shard_is_named(make_config: MakeConfig, write_shard: WriteShard, content: bytes) -> None:
    write_shard("d/a.jsonl", [2])
    empty = write_shard("d/b.jsonl", [1])
    empty.write_bytes(content)
    with pytest.raises(DataError) as caught:
        prepare(make_config(empty.parent))
    assert str(caught.value).startswith(f"{empty}: ")
    assert str(caught.value).endswith("write it again, or remove it")


def test_a_missing_shard_names_the_key(make_config: MakeConfig, write_shard: WriteShard, tmp_path: Path) -> None:
    config = make_config(write_shard("d/a.jsonl", [2]), val=[tmp_path / "absent.jsonl"])
    with pytest.raises(ConfigError) as caught:
        prepare(config)
    assert str(caught.value).startswith(f"data.val_data_paths[0]: '{tmp_path}/absent.jsonl' names no shard")


def test_an_entry_without_samples_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    still = {"obs_path": "x.npz", "task": "PushCube-v1", "actions": [[0.0] * 7] * 3}
    (tmp_path / "a.jsonl").write_text(json.dumps(still) + "\n")
    with pytest.raises(
        DataError,
        match=r"no sample in all its 1 records \(data.action.drop_noops is true\): change what .* remove data.train_",
    ):
        prepare(make_config(tmp_path / "a.jsonl", action={"drop_noops": True}))


def test_bad_records_are_counted_against_the_budget(make_config: MakeConfig, write_shard: WriteShard) -> None:
    shard = write_shard("d/a.jsonl", [2, 3])
    row = {"obs_path": "x.npz", "task": "PushCube-v1", "actions": [[float("nan")] * 7] * 4}
    with shard.open("a") as file:
        file.write(json.dumps(row) + "\n{broken\n")
    with pytest.raises(DataError, match=r"a\.jsonl:3: field actions\[0\]\[0\]: nan"):
        prepare(make_config(shard))
    entry = the_entry(prepare(make_config(shard, on_bad_sample="skip")))
    assert entry.num_samples.tolist() == [2, 3, 4, 0]
    assert (entry.num_bad, entry.num_bad_samples) == (2, 5)
    assert "a.jsonl:3: field actions[0][0]: nan is not a finite" in entry.errors[0]
    assert entry.statistics is not None
    assert entry.statistics.count == 5
    said = r"5 samples of 2 bad records, and data.bad_sample_budget is 4; the first: .*a\.jsonl:3"
    with pytest.raises(DataError, match=said):  # a run counts samples
        prepare(make_config(shard, on_bad_sample="skip", bad_sample_budget=4))
    prepare(make_config(shard, on_bad_sample="skip", bad_sample_budget=5))


def test_manifests_from_before_bad_samples_were_counted(
    make_config: MakeConfig, write_shard: WriteShard, scanned: list[str]
) -> None:
    """Where no record is bad they are good; else they are made anew."""
    good, mixed = write_shard("good/a.jsonl", [2, 3]), write_shard("mixed/b.jsonl", [2, 3])
    with mixed.open("a") as file:
        file.write(json.dumps({"obs_path": "x.npz", "task": "no such task", "actions": [[0.5] * 7] * 4}) + "\n")
    config = make_config(good, mixed, on_bad_sample="skip")
    for entry in prepare(config).entries["train"].values():
        file = entry.folder / "manifest.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "num_bad_samples"}))
        for part in (entry.folder.parents[2] / "parts").glob("*/*.npz"):
            with np.load(part) as saved:
                np.savez(part, **{name: saved[name] for name in saved.files if name != "num_bad_samples"})
    scanned.clear()
    again = prepare(config).entries["train"]
    assert [again[n].num_bad_samples for n in (0, 1)] == [0, 4]
    assert scanned == ["b.jsonl"]


def test_actions_of_two_widths_are_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    for name, width in (("a", 7), ("b", 6)):
        row = {"obs_path": "x.npz", "task": "PushCube-v1", "actions": [[0.5] * width] * 3}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"b\.jsonl:1: field actions\[0\]: 6 numbers: an action has 7 numbers"):
        prepare(make_config(tmp_path))


def test_a_shard_that_changes_while_it_is_scanned_is_refused(
    make_config: MakeConfig, write_shard: WriteShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write_shard("d/a.jsonl", [2, 3])
    real = ManiOpenPIDataset.scan_part

    def growing(self: ManiOpenPIDataset, path: Path, start: int, stop: int) -> Iterator[ScannedRecord]:
        yield from real(self, path, start, stop)
        with path.open("a") as file:
            file.write("{}\n")

    monkeypatch.setattr(ManiOpenPIDataset, "scan_part", growing)
    with pytest.raises(DataError, match=r"a\.jsonl: it changed while it was scanned: run loader-prepare again"):
        prepare(make_config(shard))
