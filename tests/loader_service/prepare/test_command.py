"""The command `loader-prepare`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loader_service.prepare.command import main
from stoker_proto.actions import load_codec
from stoker_proto.errors import ConfigError, DataError

WriteShard = Callable[..., Path]
README = Path(__file__).resolve().parents[3] / "README.md"


@pytest.fixture
def config(tmp_path: Path, write_shard: WriteShard) -> Path:
    shard = write_shard("demos/train.jsonl", [4, 4])
    for i in range(2):
        (shard.parent / f"traj_{i:06d}").mkdir()
        np.savez(shard.parent / f"traj_{i:06d}" / "obs.npz", rgb=np.full((4, 8, 8, 3), i, np.uint8))
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {base_model_path: unused}\n"
        f"data: {{dataset_type: mani_openpi, train_data_paths: ['{shard.parent}'], max_seq_len: 64}}\n"
        "trainer: {micro_batch_size: 1, global_batch_size: 1, lr: 2e-5}\n"
    )
    return path


def test_it_prints_a_table(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(config), "--set", "data.action.codec=bins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "split",
        "entry",
        "shards",
        "records",
        "samples",
        "tokens",
        "bad",
        "fingerprint",
        "path",
    ]
    assert lines[1].split()[:7] == ["train", "0", "1", "2", "8", "-", "0"]
    assert lines[1].endswith(str(config.parent / "demos"))
    text = "\n".join(lines)
    assert "actions of the codec's fit: 8" in text
    statistics = lines.index("actions of the codec's fit: 8") + 1
    assert lines[statistics].split() == ["dimension", "min", "max", "mean", "std", "q01", "q99", "normalised"]
    assert [lines[statistics + 1 + d].split()[-1] for d in range(7)] == ["yes"] * 6 + ["no"]
    assert "action codec bins: 7.00 tokens per action" in text
    assert len({len(line) for line in lines[statistics : statistics + 8]}) == 1  # aligned


def test_json_is_one_line(config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "codec.json"
    arguments = ["--config", str(config), "--set", "data.action.codec=bins", "--json", "--codec-out", str(out)]
    assert main([*arguments, "--cache-dir", str(tmp_path / "cache")]) == 0
    captured = capsys.readouterr()
    tree = json.loads(captured.out)
    assert captured.out.count("\n") == 1
    assert tree["entries"][0]["records"] == 2
    assert tree["entries"][0]["samples"] == 8
    assert tree["statistics"]["count"] == 8
    assert tree["codec"]["tokens_per_action"] == 7.0
    assert tree["codec"]["fingerprint"] == load_codec(out).fingerprint
    assert not (config.parent / "demos" / ".stoker").exists()


def test_verify_reads_everything(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(config), "--set", "data.action.codec=bins", "--verify"]
    assert main(arguments) == 0
    assert "verified: every record was read" in capsys.readouterr().out
    path = config.parent / "demos" / "traj_000001" / "obs.npz"
    content = bytearray(path.read_bytes())
    content[500] ^= 1  # inside the stored frames
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^1 bad records, named above"):
        main(arguments)
    error = capsys.readouterr().err
    assert f"loader-prepare: {path}: record {config.parent}/demos/train.jsonl:2, field rgb: its CRC-32 is" in error


def test_bad_records_that_a_run_skips_do_not_fail_verify(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(config), "--set", "data.action.codec=bins", "--set", "data.on_bad_sample=skip"]
    row = {"obs_path": "traj_000000/obs.npz", "task": "no such task", "actions": [[0.1] * 7]}
    with (config.parent / "demos" / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert main([*arguments, "--verify"]) == 0
    captured = capsys.readouterr()
    assert "verified: every record was read, 1 bad" in captured.out
    assert "train.jsonl:3: field task" in captured.err
    path = config.parent / "demos" / "traj_000001" / "obs.npz"
    content = bytearray(path.read_bytes())
    content[500] ^= 1  # which a run would not notice
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"^2 bad records, named above, of which the scan saw 1: mend or remove the others"
    ):
        main([*arguments, "--verify"])


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("data.train_data_paths=[absent]", "data.train_data_paths[0]: 'absent' names no shard"),
        ("data.dataset_typ=x", "data.dataset_typ: unknown key; did you mean data.dataset_type?"),
        ("data.options={rgb: x}", "data.options.rgb: unknown option"),
        ("data.task_table=absent.yaml", "data.task_table absent.yaml cannot be read"),
    ],
)
def test_errors_are_one_line(config: Path, argument: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        main(["--config", str(config), "--set", argument])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("--codec-out", "--verify", "examples:", "exit codes", ".stoker"):
        assert word in text
    with pytest.raises(SystemExit) as caught:
        main(["--config", "x", "--processes", "-1"])
    assert caught.value.code == 2


def test_a_model_that_is_not_there_is_said_once(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert main(["--config", str(config), "--set", "data.action.codec=bins"]) == 0
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("model.base_model_path is 'unused', and there is no such folder: no row was made")
    assert "data.max_seq_len" in message


def test_packing_that_would_change_nothing_is_refused_as_loaders_do(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["data.packing=true", "data.action.codec=bins"]
    with pytest.raises(ConfigError, match=r"data\.packing is for text, and here is none .*it holds actions"):
        main(["--config", str(config), *(word for key in overrides for word in ("--set", key))])
    (config.parent / "words").mkdir()
    (config.parent / "words" / "a.txt").write_text('["what?", "that"]\n')
    (config.parent / "plain_captions.py").write_text(CAPTIONS)
    monkeypatch.syspath_prepend(str(config.parent))
    overrides = [
        "data.packing=true", "data.dataset_type=plain_captions:Captions", f"data.train_data_paths=[{config.parent / 'words'}]"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match=r"\(plain_captions:Captions\) must set is_text and read turns"):
        main(["--config", str(config), *(word for key in overrides for word in ("--set", key))])


CAPTIONS = re.findall(r"```python\n(import json.*?)```", README.read_text(), re.S)[0]
"""The README's own dataset."""
