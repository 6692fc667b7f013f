"""`loader-doctor` on files: what it prints, its exit codes, and that a bad file hides no other."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from loader_service.cli import doctor
from loader_service.doctor import reading
from loader_service.doctor.reading import chosen_records
from tests.loader_service.doctor.made import a_manifest
from tests.tiny_models import write_model_folder

ROOT = Path(__file__).parents[3]


def write_config(folder: Path, **data: Any) -> Path:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    write_model_folder(model)
    tree = {
        "model": {"base_model_path": str(model)},
        "data": {
            "max_seq_len": 256,
            "cache_dir": str(folder / "cache"),
            "dialogue": {"template": "stoker"},
            **data,
        },
        "trainer": {"micro_batch_size": 1, "global_batch_size": 1, "lr": 1e-3},
    }
    file = folder / "stoker.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def write_chat(path: Path, answers: list[str]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Question {n}"}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    code = doctor(["--config", str(config), "--json", *arguments])
    tree = json.loads(capsys.readouterr().out)
    assert tree["exit_code"] == code
    return code, tree["findings"]


def of_check(findings: list[dict[str, Any]], name: str) -> list[tuple[str, str]]:
    return [(finding["severity"], finding["problem"]) for finding in findings if finding["check"] == name]


def test_clean_data_exits_with_0_and_names_its_fingerprints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = write_chat(tmp_path / "a.jsonl", ["One.", "Two.", "Three."])
    code, findings = report(
        capsys, write_config(tmp_path, dataset_type="chat", train_data_paths=[str(chat)]), "--strict"
    )
    assert code == 0
    ((severity, problem),) = of_check(findings, "fingerprints")
    assert severity == "note"
    assert problem.startswith("tokenizer ")
    assert ", dialogue " in problem
    assert [finding["severity"] for finding in findings] == ["note"]


def test_warnings_exit_with_2_only_where_strict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = write_chat(tmp_path / "a.jsonl", ["One.", "say </s> now", "Three."])
    config = write_config(tmp_path, dataset_type="chat", train_data_paths=[str(chat)])
    code, findings = report(capsys, config)
    assert code == 0
    expected = "1 of 3 sampled records have special tokens in their text, read as plain text: </s>"
    assert of_check(findings, "special_tokens") == [("warning", expected)]
    assert report(capsys, config, "--strict")[0] == 2


def test_a_missing_entry_and_a_bad_row_hide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = write_chat(tmp_path / "a.jsonl", ["One.", "Two.", "say </s> now"])
    with chat.open("a") as stream:
        stream.write('{"messages": 5}\n')
    paths = [str(tmp_path / "nothing.jsonl"), str(chat)]
    config = write_config(tmp_path, dataset_type="chat", train_data_paths=paths)
    code, findings = report(capsys, config)
    assert code == 1
    assert [finding["file"] for finding in findings if finding["check"] == "entries"] == ["data.train_data_paths[0]"]
    bad = [finding for finding in findings if finding["severity"] == "error" and str(chat) in json.dumps(finding)]
    assert len(bad) == 1, findings
    assert len(of_check(findings, "special_tokens")) == 1
    assert findings[0]["severity"] == "error"  # the worst first


def test_an_lfs_pointer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pointer = tmp_path / "a.jsonl"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    config = write_config(tmp_path, dataset_type="chat", train_data_paths=[str(pointer)])
    code, findings = report(capsys, config)
    assert code == 1
    assert of_check(findings, "lfs_pointers") == [("error", "1 of 1 shards are Git LFS pointers, not the data")]
    assert findings[0]["way_out"] == "fetch the files with `git lfs pull`"


def test_a_model_that_is_not_there_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = write_chat(tmp_path / "a.jsonl", ["One."])
    config = write_config(tmp_path, dataset_type="chat", train_data_paths=[str(chat)])
    shutil.rmtree(tmp_path / "model")
    code, findings = report(capsys, config)
    assert code == 1
    ((severity, problem),) = of_check(findings, "model")
    assert severity == "error"
    assert "no such folder" in problem


def test_a_config_that_is_wrong_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, dataset_type="chat", train_data_paths=["a.jsonl"], colour=1)
    code, findings = report(capsys, config)
    assert code == 1
    assert [finding["check"] for finding in findings] == ["config"]
    assert "colour" in findings[0]["problem"]


def test_the_same_entry_for_train_and_val(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = str(write_chat(tmp_path / "a.jsonl", ["One.", "Two."]))
    config = write_config(tmp_path, dataset_type="chat", train_data_paths=[chat], val_data_paths=[chat])
    code, findings = report(capsys, config)
    assert code == 1
    ((severity, _),) = of_check(findings, "train_in_val")
    assert severity == "error"


def test_ctrl_c_prints_what_was_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = write_chat(tmp_path / "a.jsonl", ["say </s> now", "Two.", "Three."])
    config = write_config(tmp_path, dataset_type="chat", train_data_paths=[str(chat)])
    real, calls = reading._read_record, []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(reading, "_read_record", interrupted)
    assert doctor(["--config", str(config)]) == 130
    text = capsys.readouterr().out
    assert "special_tokens" in text
    assert "read: 1 entries, 2 records" in text


def test_records_and_seconds_bound_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = write_chat(tmp_path / "a.jsonl", [f"Answer {n}." for n in range(50)])
    config = write_config(tmp_path, dataset_type="chat", train_data_paths=[str(chat)])
    doctor(["--config", str(config), "--records", "7"])
    assert "read: 1 entries, 7 records" in capsys.readouterr().out
    _, findings = report(capsys, config, "--seconds", "1e-9")
    assert of_check(findings, "limits") == [("note", "0 of 32 records were read in 1e-09 s; the others were not")]


def test_first_middle_and_last_then_others_by_the_seed() -> None:
    manifest = a_manifest([0, *[1] * 99])
    assert chosen_records(manifest, 3, 0) == [1, 50, 99]
    chosen = chosen_records(manifest, 10, 5)
    assert chosen[:3] == [1, 50, 99]
    assert len(set(chosen)) == 10
    assert 0 not in chosen
    assert chosen == chosen_records(manifest, 10, 5)
    assert chosen != chosen_records(manifest, 10, 6)
    assert sorted(chosen_records(manifest, 1000, 0)) == list(range(1, 100))
    assert chosen_records(a_manifest([0, 0]), 5, 0) == []


@pytest.fixture
def lerobot(tmp_path: Path) -> Path:
    pytest.importorskip("av", reason="NOT TESTED: LeRobot data sets need av; pip install 'stoker[lerobot]'")
    pytest.importorskip("pyarrow", reason="NOT TESTED: LeRobot data sets need pyarrow; pip install 'stoker[lerobot]'")
    from tests.loader_service.sources.lerobot.files import write_lerobot

    return write_lerobot(tmp_path / "set", [12, 12, 12])


def lerobot_config(folder: Path, root: Path) -> Path:
    action = {"codec": "bins", "unmasked": []}
    return write_config(folder, dataset_type="lerobot", train_data_paths=[str(root)], action=action)


def test_lerobot_timestamps_off_the_grid(tmp_path: Path, lerobot: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.loader_service.sources.lerobot.files import change_table

    config = lerobot_config(tmp_path, lerobot)
    _, findings = report(capsys, config)
    assert of_check(findings, "timestamps") == []
    assert of_check(findings, "video_frames") == []
    assert of_check(findings, "brief_episodes") == []
    assert len(of_check(findings, "round_trip")) == 1  # a note: the mean error per dimension
    shutil.rmtree(tmp_path / "cache")
    for file in lerobot.glob("data/*/*.parquet"):
        change_table(file, timestamp=lambda values: (np.asarray(values) + 0.002).tolist())
    _, findings = report(capsys, config)
    ((severity, problem),) = of_check(findings, "timestamps")
    assert severity == "warning"
    assert problem.startswith("timestamps up to 0.002 s off the grid of fps")
    assert "in 3 of 3 sampled episodes" in problem


def test_lerobot_rows_that_a_video_does_not_have(
    tmp_path: Path, lerobot: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.loader_service.sources.lerobot.files import write_lerobot

    longer = write_lerobot(tmp_path / "longer", [12, 12, 14])
    videos = sorted(file.relative_to(lerobot) for file in lerobot.glob("videos/**/*.mp4"))
    last = max(videos)
    shutil.copy(longer / last, lerobot / last)
    _, findings = report(capsys, lerobot_config(tmp_path, lerobot))
    ((severity, problem),) = of_check(findings, "video_frames")
    assert severity == "warning"
    assert problem == "14 frames, and its episodes have 12 rows"


def test_episodes_of_less_than_a_second_and_a_sensor_that_is_stuck(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What lerobot-doctor 0.2.0 finds in these files, but for 'jumps' of actions that rise in equal steps."""
    data = Path(os.environ.get("STOKER_SHARED_DATA", ROOT.parent / "shared" / "data"))
    root = data / "cases" / "cameras_ab"
    if not root.exists():
        pytest.skip(f"NOT TESTED on recorded cases: no {root}; set STOKER_SHARED_DATA to the folder that holds cases")
    action = {"codec": "bins", "unmasked": [], "chunk": 10}
    config = write_config(tmp_path, dataset_type="lerobot", train_data_paths=[str(root)], action=action, state="text")
    _, findings = report(capsys, config)
    said = ("warning", "2 of 2 episodes are shorter than a second (fps 10), the first is episode 0 of 5 frames")
    assert of_check(findings, "brief_episodes") == [said]
    assert of_check(findings, "dead_dimensions") == [("warning", "the value is -1 in all 10 sampled states")]
    assert len(of_check(findings, "short_episodes")) == len(of_check(findings, "published_statistics")) == 1


@pytest.mark.long
@pytest.mark.parametrize("name", ["lerobot_v3", "lerobot_v21"])
def test_real_episodes_show_what_other_tools_show(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(os.environ.get("STOKER_SHARED_DATA", ROOT.parent / "shared" / "data")) / name
    if not root.exists():
        pytest.skip(f"NOT TESTED on real episodes: no {root}; set STOKER_SHARED_DATA to the folder that holds {name}")
    config = write_config(
        tmp_path, dataset_type="lerobot", train_data_paths=[str(root)], action={"codec": "bins", "chunk": 16}
    )
    code, findings = report(capsys, config, "--seconds", "600")
    assert code == 0
    assert of_check(findings, "saturated") == [("warning", "71.2% of 250 sampled values are the maximum, 1")]
    ((_, problem),) = of_check(findings, "short_episodes")
    assert problem.startswith("25 of 25 episodes are shorter than a chunk of actions (data.action.chunk 16)")
    assert len(of_check(findings, "published_statistics")) == (name == "lerobot_v21")
