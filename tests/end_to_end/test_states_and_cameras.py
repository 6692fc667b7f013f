"""`mani_openpi` with states, several cameras and history: what a rank gets, and what is refused before it is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.end_to_end.fleet import micro_batches_of, pull, run_cli, serving, write_config, write_demonstrations

LENGTHS = [5, 7, 4]
STATE_AND_CAMERAS = {"camera_keys": ["rgb", ["wrist_rgb", "wrist"]], "image_history": [-1, 0]}


def write_states(folder: Path, *, in_rows: bool) -> tuple[Path, list[np.ndarray]]:
    """Trajectories with a wrist camera, and with states in the rows or in the NPZ; the JSONL and the states."""
    jsonl = write_demonstrations(folder, LENGTHS)
    rng = np.random.default_rng(3)
    rows, states = [json.loads(line) for line in jsonl.read_text().splitlines()], []
    for row in rows:
        path = jsonl.parent / row["obs_path"]
        with np.load(path) as npz:
            arrays = {"rgb": npz["rgb"], "wrist": 255 - npz["rgb"]}
        states.append(rng.normal(size=(len(row["actions"]), 3)).astype(np.float32))
        if in_rows:
            row["states"] = states[-1].tolist()
        else:
            arrays["state"] = states[-1]
        np.savez_compressed(path, **arrays)
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return jsonl, states


def inspected(config: Path, model: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """Samples of loader-inspect by (record, timestep), with their tokens as `text`."""
    done = run_cli("inspect", "--config", str(config), "--json", "--num", "1000")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    samples = [sample for line in done.stdout.splitlines() for sample in json.loads(line)["samples"]]
    return {
        (sample["record"], sample["timestep"]): {**sample, "text": tokenizer.decode(sample["input_ids"])}
        for sample in samples
    }


def words(states: list[np.ndarray]) -> dict[tuple[int, int], str]:
    """openpi's rule by the letter, with numpy's own percentiles."""
    low, high = np.quantile(np.concatenate(states), [0.01, 0.99], axis=0)
    edges = np.linspace(-1, 1, 257)[:-1]
    return {
        (record, t): " ".join(map(str, np.digitize(np.clip(2 * (s - low) / (high - low) - 1, -1, 1), edges) - 1))
        for record, of_record in enumerate(states)
        for t, s in enumerate(of_record.astype(np.float64))
    }


@pytest.mark.parametrize("in_rows", [True, False])
def test_states_are_told_in_words_and_reach_the_rank(tmp_path: Path, model: Path, in_rows: bool) -> None:
    jsonl, states = write_states(tmp_path / "demos", in_rows=in_rows)
    config = write_config(tmp_path, model, [jsonl], state="text", options=STATE_AND_CAMERAS)
    found = inspected(config, model)
    expected = words(states)
    assert found.keys() == expected.keys()
    for key, sample in found.items():
        assert f"State: {expected[key]};" in sample["text"]
        assert len(sample["input_ids"]) > 64  # four images of 16 tokens
    seen = 0
    for micro in micro_batches_of(config):
        for b in range(micro.num_rows):
            _, record, timestep = micro.keys[b].tolist()
            sample, seen = found[record, timestep], seen + 1
            assert micro.input_ids[b, : len(sample["input_ids"])].tolist() == sample["input_ids"]
    assert seen == sum(LENGTHS)


def test_states_of_rows_and_of_an_npz_give_the_same_batches(tmp_path: Path, model: Path) -> None:
    steps = []
    for name, in_rows in (("rows", True), ("arrays", False)):
        jsonl, _ = write_states(tmp_path / name, in_rows=in_rows)
        (tmp_path / name / "configs").mkdir()
        config = write_config(tmp_path / name / "configs", model, [jsonl], state="text", options=STATE_AND_CAMERAS)
        with serving(config) as loader:
            steps.append(pull(config, [loader.address]).steps)
    assert steps[0] == steps[1]


def test_asking_for_states_later_scans_anew(tmp_path: Path, model: Path) -> None:
    """The cache of a scan without states is not taken for one with."""
    jsonl, states = write_states(tmp_path / "demos", in_rows=True)
    without = write_config(tmp_path, model, [jsonl])
    assert "State:" not in json.dumps(list(inspected(without, model).values()))
    found = inspected(write_config(tmp_path, model, [jsonl], state="text"), model)
    assert f"State: {words(states)[1, 2]};" in found[1, 2]["text"]


@pytest.mark.parametrize(
    ("options", "fits"),
    [({}, True), ({"camera_keys": ["rgb", "wrist"]}, False), ({"image_history": [-1, 0]}, False)],
)
def test_images_that_cannot_fit_are_said_at_the_start(
    tmp_path: Path, model: Path, options: dict[str, Any], fits: bool
) -> None:
    """16 tokens an image: one fits into 52 with the words, two do not."""
    jsonl, _ = write_states(tmp_path / "demos", in_rows=True)
    config = write_config(tmp_path, model, [jsonl], options=options, max_seq_len=52)
    done = run_cli("serve", "--config", str(config), "--check")
    if fits:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert "max_seq_len" in line
        assert "demos.jsonl" in line


def test_data_without_states_are_named(tmp_path: Path, model: Path) -> None:
    jsonl = write_demonstrations(tmp_path / "demos", [3, 4])
    config = write_config(tmp_path, model, [jsonl], state="text")
    done = run_cli("serve", "--config", str(config), "--check")
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert "traj_0/obs.npz: record" in line
    assert "demos.jsonl:1, field states: no states" in line
    assert "data.options.state_keys, or set data.state to none" in line
