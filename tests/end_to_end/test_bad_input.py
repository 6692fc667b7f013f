"""What a user sees when something is wrong: one line that names the thing and the way out, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from stoker_proto.config.reader import load_config
from stoker_proto.errors import DataError, DeadlineError, RefusedError
from tests.end_to_end.conftest import LENGTHS
from tests.end_to_end.fleet import pull, run_cli, serving, write_config, write_demonstrations
from tests.support.slowness import slowness
from trainer.feed.feed import Feed


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Ten trajectories of 4 timesteps, the fourth of which is cut short on disk."""
    jsonl = write_demonstrations(tmp_path / "damaged", [4] * 10)
    npz = jsonl.parent / "traj_3" / "obs.npz"
    npz.write_bytes(npz.read_bytes()[:-40])
    return jsonl


def one_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line]
    assert len(lines) == 1, text
    return lines[0]


def test_policy_fail_ends_the_run_with_the_sample_and_the_loader_lives(
    tmp_path: Path, model: Path, damaged: Path
) -> None:
    config = write_config(tmp_path, model, [damaged])
    with serving(config) as loader:
        with pytest.raises(DataError, match=r"traj_3/obs.npz") as first:
            pull(config, [loader.address])
        with pytest.raises(DataError) as second:
            pull(config, [loader.address])
        assert loader.process.poll() is None
    assert str(first.value) == str(second.value)
    one_line(str(first.value))


def test_policy_skip_keeps_the_samples_place_and_counts_it(tmp_path: Path, model: Path, damaged: Path) -> None:
    config = write_config(tmp_path, model, [damaged], on_bad_sample="skip")
    with serving(config) as loader:
        pulled = pull(config, [loader.address])
    assert len(pulled.keys) == 40
    assert len(set(pulled.keys)) == 40
    assert len(pulled.skipped) == 4
    assert all("traj_3/obs.npz" in text for text in pulled.skipped)


def test_a_changed_trajectory_is_noticed(tmp_path: Path, model: Path) -> None:
    jsonl = write_demonstrations(tmp_path / "demos", [4] * 6)
    config = write_config(tmp_path, model, [jsonl])
    assert run_cli("prepare", "--config", str(config)).returncode == 0
    np.savez_compressed(jsonl.parent / "traj_2" / "obs.npz", rgb=np.zeros((3, 32, 32, 3), np.uint8))
    with serving(config) as loader, pytest.raises(DataError, match=r"traj_2.*3.*4"):
        pull(config, [loader.address])


@pytest.mark.parametrize("policy", ["fail", "skip"])
def test_a_shard_that_changes_while_it_is_served_is_never_mixed_in(tmp_path: Path, model: Path, policy: str) -> None:
    jsonl = write_demonstrations(tmp_path / "demos", [4] * 6)
    config = write_config(tmp_path, model, [jsonl], on_bad_sample=policy)
    with serving(config) as loader:
        expected = pull(config, [loader.address]).steps
    first, *others = jsonl.read_text().splitlines(keepends=True)
    known = jsonl.stat()
    with serving(config, log=tmp_path / "log") as loader:
        for changed in ("".join([*others, first]), f"{first.replace('PickCube-v1', 'PushCube-v1')}{''.join(others)}"):
            (tmp_path / "new").write_text(changed)
            (tmp_path / "new").replace(jsonl)
            with pytest.raises(
                DeadlineError, match=rf"{jsonl}: it changed since it was scanned .*start the loader again"
            ):
                pull(config, [loader.address], "trainer.feed.data_deadline_s=1")
        jsonl.unlink()
        with pytest.raises(DeadlineError, match=rf"{jsonl}: it cannot be read any more"):
            pull(config, [loader.address], "trainer.feed.data_deadline_s=1")
        jsonl.write_text("".join([first, *others]))
        os.utime(jsonl, ns=(known.st_atime_ns, known.st_mtime_ns))
        assert pull(config, [loader.address]).steps == expected
    assert (tmp_path / "log").read_text().count("it changed since") == 1  # however often ranks ask


def test_a_loader_with_other_data_is_refused_with_the_difference(tmp_path: Path, config: Path, model: Path) -> None:
    other_data = write_demonstrations(tmp_path / "other", LENGTHS, seed=7)
    other = write_config(tmp_path, model, [other_data])
    with serving(config) as a, serving(other) as b:
        loaded = load_config(config, [f"cluster.loader_addresses=[{a.address}]"])
        with Feed(loaded, "train", 0, 1) as feed:
            fingerprints = feed.connect().fingerprints  # as a checkpoint of this run has them
        with pytest.raises(RefusedError, match=r"manifest/train/0"):
            pull(config, [b.address], pins=fingerprints)


@pytest.mark.parametrize("name", ["learn_padding", "tasks"])
def test_loaders_of_different_entries_that_read_differently_are_told_apart(
    tmp_path: Path, model: Path, name: str
) -> None:
    """They have no manifest in common: without this, a run would mix what both make of their entries."""
    parts = [write_demonstrations(tmp_path / part, [6, 9, 4, 8], seed=i) for i, part in enumerate("ab")]
    config = write_config(tmp_path, model, parts, action={"codec": "bins", "chunk": 2})
    codec = tmp_path / "codec.json"
    assert run_cli("prepare", "--config", str(config), "--codec-out", str(codec)).returncode == 0
    (tmp_path / "tasks.yaml").write_text("PickCube-v1: lift the cube\n")
    differs = {
        "learn_padding": "data.action.learn_padding=false",
        "tasks": f"data.task_table={tmp_path / 'tasks.yaml'}",
    }[name]
    given = ("--set", f"data.action.codec_path={codec}")
    with (
        serving(config, "--shards", str(parts[0]), *given) as a,
        serving(config, "--shards", str(parts[1]), *given, "--set", differs) as b,
        serving(config, "--shards", str(parts[1]), *given) as c,
    ):
        with pytest.raises(RefusedError, match=rf"read/{name}"):
            pull(config, [a.address, b.address], f"data.action.codec_path={codec}")
        assert len(pull(config, [a.address, c.address], f"data.action.codec_path={codec}").keys) == 54


def test_a_loader_with_another_template_is_refused_by_name(
    tmp_path: Path, config: Path, model: Path, demos: Path
) -> None:
    other = write_config(tmp_path, model, [demos], dialogue={"template": "openvla"})
    with serving(other) as loader, pytest.raises(RefusedError, match="dialogue"):
        pull(config, [loader.address])


def test_nobody_there_names_the_address_and_ends_in_time(config: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"tcp://127\.0\.0\.1:9"):
        pull(config, ["tcp://127.0.0.1:9"], "trainer.feed.connect_deadline_s=1")
    assert time.monotonic() - started < 10 * slowness()


def test_an_entry_that_nobody_holds_is_named(tmp_path: Path, model: Path) -> None:
    parts = [write_demonstrations(tmp_path / name, [4] * 6, seed=i) for i, name in enumerate("ab")]
    config = write_config(tmp_path, model, parts)
    codec = tmp_path / "codec.json"
    assert run_cli("prepare", "--config", str(config), "--codec-out", str(codec)).returncode == 0
    given = f"data.action.codec_path={codec}"
    with (
        serving(config, "--shards", str(parts[0]), "--set", given) as loader,
        pytest.raises(DeadlineError, match=str(parts[1])),
    ):
        pull(config, [loader.address], given, "trainer.feed.connect_deadline_s=2")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": {"max_seq_len": 20}}, "max_seq_len"),
        ({"model": {"base_model_path": "/nowhere/model"}}, "/nowhere/model"),
        ({"data": {"train_data_paths": ["/nowhere/demos.jsonl"]}}, "/nowhere/demos.jsonl"),
        ({"data": {"dataset_type": "mani_openpie"}}, "mani_openpie"),
        ({"data": {"max_seq_length": 5}}, "did you mean data.max_seq_len"),
        ({"data": {"max_seq_len": "many"}}, "data.max_seq_len"),
        ({"trainer": {"global_batch_size": 9}, "cluster": {"component_placement": {"trainer": "0-1"}}}, "8 or 16"),
    ],
)
def test_check_says_what_is_wrong_in_one_line(config: Path, tmp_path: Path, change: dict, expected: str) -> None:  # type: ignore[type-arg]
    tree = yaml.safe_load(config.read_text())
    for section, keys in change.items():
        tree.setdefault(section, {}).update(keys)
    path = tmp_path / "changed.yaml"
    path.write_text(yaml.safe_dump(tree))
    done = run_cli("serve", "--config", str(path), "--check")
    assert done.returncode != 0
    assert expected in one_line(done.stderr)


def test_check_passes_on_good_data(config: Path) -> None:
    done = run_cli("serve", "--config", str(config), "--check")
    assert done.returncode == 0, done.stderr
    assert f"1 shards {len(LENGTHS)} records {sum(LENGTHS)} samples" in done.stdout


def test_shards_that_are_a_part_of_an_entry_are_served_and_said(tmp_path: Path, model: Path) -> None:
    first = write_demonstrations(tmp_path / "data", [4] * 3)
    shutil.copy(first, first.with_name("more.jsonl"))
    config = write_config(tmp_path, model, [first.parent])
    done = run_cli("serve", "--config", str(config), "--check", "--shards", str(first))
    assert done.returncode == 0, done.stderr
    assert "train: 1 shards of 2 shards of entries held in part" in done.stdout


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:5999", "tcp://*:5999", "tcp://192.168.1.5:5999"])
def test_binding_beyond_loopback_needs_to_be_said(config: Path, address: str) -> None:
    done = run_cli("serve", "--config", str(config), "--check", "--bind", address)
    assert done.returncode != 0
    assert "--insecure" in one_line(done.stderr)


def test_a_port_in_use_is_named(config: Path) -> None:
    with serving(config) as loader:
        done = run_cli("serve", "--config", str(config), "--bind", loader.address)
    assert done.returncode != 0
    assert loader.address in one_line(done.stderr)


def test_stopping_leaves_nothing_behind(config: Path, tmp_path: Path) -> None:
    with serving(config, TMPDIR=str(tmp_path)) as loader:
        assert list(tmp_path.glob("stoker-loader-*"))
        assert loader.end() == 0
    assert not list(tmp_path.glob("stoker-loader-*"))


def test_a_killed_loaders_folder_is_removed_by_the_next_one(config: Path, tmp_path: Path) -> None:
    with serving(config, TMPDIR=str(tmp_path)) as loader:
        loader.process.kill()
        loader.process.wait(60)
    (left,) = tmp_path.glob("stoker-loader-*")
    with serving(config, TMPDIR=str(tmp_path)):
        assert not left.exists()


def test_a_dataset_class_from_outside_the_repository(tmp_path: Path, model: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "captions.py").write_text(OUTSIDE)
    (outside / "captions.txt").write_text(
        "\n".join(json.dumps([f"what is number {i}?", f"it is {i}"]) for i in range(9))
    )
    config = write_config(tmp_path, model, [outside], dataset_type="captions:Captions")
    with serving(config, PYTHONPATH=f"{Path.cwd()}:{Path.cwd() / 'proto'}:{outside}") as loader:
        assert "9 records 9 samples" in loader.ready_line
        pulled = pull(config, [loader.address])
    assert sorted(key[1] for key in pulled.keys) == list(range(9))


@pytest.mark.parametrize(
    ("given", "message"), [(1, "it gives 1 samples, the scan counted 2"), (3, "more samples than")]
)
def test_a_dataset_that_gives_another_number_than_it_counted(
    tmp_path: Path, model: Path, given: int, message: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    several = f"        for _ in range({given}):\n            yield Sample"
    wrong = OUTSIDE.replace("num_samples=1", "num_samples=2").replace("        yield Sample", several)
    (outside / "captions.py").write_text(wrong)
    (outside / "captions.txt").write_text("\n".join(json.dumps(["what?", "that"]) for _ in range(9)))
    config = write_config(tmp_path, model, [outside], dataset_type="captions:Captions")
    with (
        serving(config, PYTHONPATH=f"{Path.cwd()}:{Path.cwd() / 'proto'}:{outside}") as loader,
        pytest.raises(DataError, match=message),
    ):
        pull(config, [loader.address])


README = Path(__file__).resolve().parents[2] / "README.md"
(OUTSIDE,) = [
    block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "class Captions" in block
]
"""The example that the README shows."""
