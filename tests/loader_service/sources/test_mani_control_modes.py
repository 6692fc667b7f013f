"""`mani_openpi`: rows of several control modes are not trained as one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from loader_service.sources.mani_openpi import ManiOpenPIDataset
from stoker_proto.config import DataConfig
from stoker_proto.errors import DataError

EE, JOINT = "pd_ee_delta_pose", "pd_joint_delta_pos"


def write_rows(file: Path, modes: Sequence[str | None]) -> Path:
    rows = [
        {"obs_path": "o.npz", "instruction": "push", "actions": [[0.5] * 7], "control_mode": mode} for mode in modes
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def dataset(*files: Path, val: Sequence[Path] = ()) -> ManiOpenPIDataset:
    return ManiOpenPIDataset(
        DataConfig(
            dataset_type="mani_openpi",
            train_data_paths=tuple(map(str, files)),
            val_data_paths=tuple(map(str, val)),
            max_seq_len=64,
        )
    )


def test_two_modes_in_a_file(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", [EE, None, EE])
    assert len(list(dataset(file).scan(file))) == 3
    write_rows(file, [EE, EE, JOINT])
    with pytest.raises(DataError) as caught:
        list(dataset(file).scan(file))
    assert str(caught.value) == (
        f"{file}:3: field control_mode: {JOINT}, and the first row that names one has {EE}: the same numbers mean other "
        "motions; make each a source of its own (data.sources)"
    )
    last = file.read_bytes().rindex(b"\n", 0, -1) + 1  # a part of the file, for a process of its own
    part = dataset(file).scan_part(file, last, file.stat().st_size)
    with pytest.raises(DataError, match=r"a\.jsonl:3: field control_mode"):
        list(part)


def test_two_files_of_an_entry_of_two_entries_and_of_two_splits(tmp_path: Path) -> None:
    a, b = write_rows(tmp_path / "a.jsonl", [EE]), write_rows(tmp_path / "b.jsonl", [JOINT])
    expected = rf"^{b}: field control_mode: {JOINT}, and {a} has {EE}"
    with pytest.raises(DataError, match=expected):
        dataset(tmp_path).locate(str(tmp_path))
    both = dataset(a, b)
    both.locate(str(a))
    with pytest.raises(DataError, match=expected):
        both.locate(str(b))
    splits = dataset(a, val=[b])
    splits.for_split("train").locate(str(a))
    with pytest.raises(DataError, match=expected):
        splits.for_split("val").locate(str(b))


def test_rows_without_a_mode_in_front(tmp_path: Path) -> None:
    """As in a file to which rows of a newer recording were appended."""
    a = write_rows(tmp_path / "a.jsonl", [None, None, EE, None, EE])
    assert len(list(dataset(a).scan(a))) == 5
    write_rows(a, [None, None, EE, JOINT])
    with pytest.raises(
        DataError, match=rf"a\.jsonl:4: field control_mode: {JOINT}, and the first row that names one has {EE}"
    ):
        list(dataset(a).scan(a))
    write_rows(a, [None, EE])
    b = write_rows(tmp_path / "b.jsonl", [None, JOINT])
    both = dataset(a, b)
    both.locate(str(a))
    with pytest.raises(DataError, match=rf"^{b}: field control_mode: {JOINT}, and {a} has {EE}"):
        both.locate(str(b))


def test_a_mode_far_behind_rows_without_one(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", [None, EE, JOINT])
    padded = json.dumps({"obs_path": "o.npz", "instruction": "p" * (1 << 20), "actions": [[0.5] * 7]}) + "\n"
    a.write_text(padded + a.read_text())
    with pytest.raises(DataError, match=rf"a\.jsonl:4: field control_mode: {JOINT}"):
        list(dataset(a).scan(a))
