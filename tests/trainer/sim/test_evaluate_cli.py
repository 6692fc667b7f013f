"""`python -m trainer.sim.evaluate` with exports of tiny random models in the small pushing world; and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stoker_proto.actions import StatisticsAccumulator
from stoker_proto.processor import Processor
from tests.trainer.support.memory import make_config, make_processor
from trainer.sim.evaluate import main

REPOSITORY = Path(__file__).resolve().parents[3]
PUSHING = ["--env-module", "tests.trainer.sim.pushing", "--image-size", "64", "--max-steps", "3", "--quiet"]
DEADLINE_S = 240

process = pytest.mark.process


def save_export(folder: Path, model: Path, processor: Processor) -> Path:
    """As `trainer.checkpoints.export` writes it."""
    shutil.copytree(model, folder)
    processor.save(folder)
    return folder


@pytest.fixture(scope="module")
def export(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with 3 numbers per action and one picture."""
    out = tmp_path_factory.mktemp("export")
    return save_export(out / "export", tiny_llava, make_processor(make_config(tiny_llava, out)).with_num_images((1, 1)))


def changed(export: Path, folder: Path, scale: float) -> Path:
    """The same model with its output layer scaled; NaN spoils it."""
    shutil.copytree(export, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("lm_head.weight"))
    weights[name] = (weights[name] * scale).astype(weights[name].dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def episodes(out: Path) -> list[tuple[str, str, int, int]]:
    """(model, task, seed, steps), in the order in which they are kept."""
    tree = json.loads((out / "results.json").read_text())
    return [(row["model"], row["task"], row["seed"], row["steps"]) for row in tree["episodes"]]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for needed in (
        "at the end",
        "Wilson",
        "Newcombe",
        "--env-module",
        "install_renderer.sh",
        "stoker[sim]",
        "examples:",
    ):
        assert needed in text


@process
def test_an_evaluation_its_files_and_its_resume(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--model", str(export), "--task", "mute", *PUSHING, "--out", str(out), "--seed-start", "30"]
    assert main([*arguments, "--episodes", "3"]) == 0
    text = capsys.readouterr().out
    for line in ("model: ", "3 of 3 episodes", "mute", "  push it", "  shove it", "0.0% [0.0, 56.1]"):
        assert line in text
    assert sorted(episodes(out)) == [("model", "mute", seed, 3) for seed in (30, 31, 32)]
    tree = json.loads((out / "results.json").read_text())
    assert tree["summary"]["model"]["mute"]["success_once"] == {
        "value": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.5615, abs=1e-4),
    }
    assert set(tree["summary"]["model"]["mute"]["instructions"]) == {"push it", "shove it", "move it"}
    assert 0.5 < tree["episodes"][0]["outside_mass"] < 1, "a random model gives its 16 action tokens little"
    assert tree["environments"]["mute"]["control_mode"] == "delta_xy"
    assert tree["models"]["model"]["protocol"]["execute"] == 1
    assert sorted(path.suffix for path in (out / "videos").iterdir()) == [".mp4", ".mp4", ".png", ".png"]
    assert (out / "contact_sheet.png").stat().st_size > 1000

    first = episodes(out)
    assert main([*arguments, "--episodes", "4"]) == 0
    assert episodes(out)[:3] == first, "finished episodes are kept"
    assert episodes(out)[3:] == [("model", "mute", 33, 3)]
    assert main([*arguments, "--episodes", "4"]) == 0
    assert len(episodes(out)) == 4, "nothing is played again"


@process
def test_two_exports_on_the_same_seeds(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(export, tmp_path / "other", -1.0)
    out = tmp_path / "out"
    arguments = [
        "--model",
        str(export),
        "--task",
        "pushing",
        *PUSHING,
        "--out",
        str(out),
        "--videos",
        "0",
        "--episodes",
        "3",
    ]
    assert main([*arguments, "--compare", str(other), "--seed-start", "0"]) == 0
    kept = episodes(out)
    assert [row[0] for row in kept] == ["model"] * 3 + ["other"] * 3
    assert sorted(row[2] for row in kept[3:]) == [0, 1, 2]
    comparison = json.loads((out / "results.json").read_text())["comparison"]
    assert comparison["method"].startswith("Newcombe 1998, method 10")
    once = comparison["tasks"][0]
    assert (once["task"], once["success"], once["neither"]) == ("pushing", "success_once", 3)
    assert once["difference"]["low"] == pytest.approx(-0.5615, abs=1e-4)
    assert "+0.0 [-56.1, +56.1]" in capsys.readouterr().out
    rows = json.loads((out / "results.json").read_text())["episodes"]
    rewards = {(row["model"], row["seed"]): row["reward"] for row in rows}
    assert all(rewards["model", seed] != rewards["other", seed] for seed in range(3)), "two models act differently"


@process
def test_a_lost_episode_is_played_by_the_next_run(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "--model",
        str(export),
        "--task",
        "crashing",
        *PUSHING,
        "--out",
        str(tmp_path / "out"),
        "--videos",
        "0",
    ]
    arguments += ["--episodes", "4", "--seed-start", "0", "--processes", "1"]
    assert main([*arguments, "--most-deaths", "2"]) == 0
    assert [row[2] for row in episodes(tmp_path / "out")] == [0, 2]
    assert "2 episodes have no result; the same command plays them" in capsys.readouterr().out
    assert main([*arguments, "--most-deaths", "1"]) == 1
    assert (
        "evaluate: 2 simulators died (--most-deaths 1), the last one in crashing seed 3: exit code 7; try fewer --processes"
        in capsys.readouterr().err
    )
    deaths = json.loads((tmp_path / "out" / "results.json").read_text())["deaths"]
    assert [death["seed"] for death in deaths] == [1, 3, 1, 3]


def refused(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that it says."""
    assert main([*arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("evaluate: ")
    return lines[0]


Capsys = pytest.CaptureFixture[str]


def test_an_unknown_task_is_refused(export: Path, tmp_path: Path, capsys: Capsys) -> None:
    line = refused(["--model", str(export), "--task", "PushCube"], tmp_path, capsys)
    assert "unknown task 'PushCube'; known: PushCube-v1, PickCube-v1, PullCube-v1, StackCube-v1" in line
    assert not (tmp_path / "out").exists()


def test_a_task_with_one_valid_instruction_cannot_be_swapped(export: Path, tmp_path: Path, capsys: Capsys) -> None:
    line = refused(
        ["--model", str(export), "--task", "StackCube-v1", "--task", "PushCube-v1", "--swap"], tmp_path, capsys
    )
    assert "the scene of PushCube-v1 has one valid instruction" in line
    assert line.endswith("tasks that have another: StackCube-v1, StackGreenOnRed-v1")


def test_an_export_without_actions_is_refused(tiny_llava: Path, tmp_path: Path, capsys: Capsys) -> None:
    processor = Processor.build(make_config(tiny_llava, tmp_path), None)
    folder = save_export(tmp_path / "export", tiny_llava, processor)
    line = refused(["--model", str(folder), "--task", "PushCube-v1"], tmp_path, capsys)
    assert line.endswith("this model was trained without actions, so it cannot be used as a policy")


def test_a_folder_that_is_no_export_is_refused(tiny_llava: Path, tmp_path: Path, capsys: Capsys) -> None:
    for folder in (tiny_llava, tmp_path / "absent"):
        line = refused(["--model", str(folder), "--task", "PushCube-v1"], tmp_path, capsys)
        assert f"{folder}: there is no stoker_processor.json, as an export has it, and no stoker.json" in line


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      "])
def test_damaged_weights_are_refused(content: bytes, export: Path, tmp_path: Path, capsys: Capsys) -> None:
    folder = Path(shutil.copytree(export, tmp_path / "export"))
    (folder / "model.safetensors").write_bytes(content)
    line = refused(["--model", str(folder), "--task", "PushCube-v1"], tmp_path, capsys)
    assert f"{folder}: its weights cannot be loaded: " in line
    assert line.endswith("; export it again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--execute", "2"], "--execute 2: the model predicts chunks of 1; choose 1 to 1"),
        (["--state", "qpos"], "--state qpos: this model was trained without a state"),
        (["--env-module", "my_absent_envs"], "--env-module my_absent_envs: importing it failed"),
    ],
)
def test_options_that_do_not_fit_the_model(
    options: list[str], message: str, export: Path, tmp_path: Path, capsys: Capsys
) -> None:
    assert message in refused(["--model", str(export), "--task", "PushCube-v1", *options], tmp_path, capsys)


@pytest.mark.parametrize("options", [["--episodes", "0"], ["--image-history", "0,-1"], ["--image-history", "1"]])
def test_numbers_out_of_range_are_refused(options: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--model", "unused", "--task", "PushCube-v1", *options])
    assert exit_info.value.code == 2


def test_missing_pyav_names_the_extra(
    export: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    line = refused(["--model", str(export), "--task", "PushCube-v1"], tmp_path, capsys)
    assert "pip install 'stoker[sim]', or pass --videos 0" in line


@process
def test_another_number_of_cameras_is_refused(export: Path, tmp_path: Path, capsys: Capsys) -> None:
    arguments = ["--model", str(export), "--task", "two cameras", *PUSHING]
    assert "and here are 2 (cameras above, again; 1 moments)" in refused(arguments, tmp_path, capsys)
    arguments = ["--model", str(export), "--task", "pushing", *PUSHING, "--image-history=-4,0"]
    assert "and here are 2 (cameras above; 2 moments)" in refused(arguments, tmp_path, capsys)


@process
def test_a_missing_simulator_names_what_to_install(
    export: Path, tmp_path: Path, capsys: Capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the simulator process, where an empty package hides ManiSkill's."""
    (tmp_path / "mani_skill").mkdir()
    (tmp_path / "mani_skill" / "__init__.py").write_text("raise ImportError('no ManiSkill here')\n")
    monkeypatch.syspath_prepend(tmp_path)
    line = refused(["--model", str(export), "--task", "PushCube-v1"], tmp_path, capsys)
    assert "the simulator needs ManiSkill" in line
    assert (
        "pip install 'stoker[sim]', then the renderer with: STOKER_PYTHON=$(command -v python) sh "
        "trainer/sim/install_renderer.sh" in line
    )


@process
def test_a_policy_that_computes_nan_is_refused(export: Path, tmp_path: Path, capsys: Capsys) -> None:
    spoilt = changed(export, tmp_path / "spoilt", float("nan"))
    line = refused(["--model", str(spoilt), "--task", "pushing", *PUSHING], tmp_path, capsys)
    assert "the model's logits for action token 0 are not finite" in line


@process
def test_the_state_that_the_export_asks_for(tiny_llava: Path, tmp_path: Path, capsys: Capsys) -> None:
    config = make_config(tiny_llava, tmp_path)
    config = replace(config, data=replace(config.data, state="text"))
    accumulator = StatisticsAccumulator(2)
    accumulator.add(np.random.default_rng(0).uniform(size=(300, 2)), np.arange(300, dtype=np.uint64))
    processor = Processor.build(config, make_processor(config).codec, accumulator.finish()[0])
    export = save_export(tmp_path / "export", tiny_llava, processor)
    arguments = ["--model", str(export), "--task", "pushing", *PUSHING, "--videos", "0", "--episodes", "1"]
    line = refused(arguments, tmp_path, capsys)
    assert "a state of 2 numbers, and --state is not given: name the measurement" in line
    assert line.endswith("here are: hand (2)")
    assert main([*arguments, "--state", "hand", "--out", str(tmp_path / "second")]) == 0
    assert len(episodes(tmp_path / "second")) == 1


@process
def test_an_interrupted_evaluation_keeps_its_episodes_and_leaves_no_process(export: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--model", export, "--task", "pushing", *PUSHING, "--episodes", 10_000, "--videos", 0, "--out", out]
    evaluation: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-m", "trainer.sim.evaluate", *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "proto")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_episodes(evaluation, out, 2)
        busy = main([str(argument) for argument in arguments])
        os.killpg(evaluation.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = evaluation.communicate(timeout=DEADLINE_S)
    finally:
        if evaluation.poll() is None:
            os.killpg(evaluation.pid, signal.SIGKILL)
            evaluation.wait()
    assert busy == 1, "two evaluations would lose each other's episodes"
    assert evaluation.returncode == 130
    assert errors.splitlines() == [f"interrupted; the finished episodes are in {out}, and the same command resumes"]
    tree: dict[str, Any] = json.loads((out / "results.json").read_text())
    assert 2 <= len(tree["episodes"]) < 10_000
    assert tree["summary"]["model"]["pushing"]["episodes"] == len(tree["episodes"])


def wait_for_episodes(evaluation: subprocess.Popen[str], out: Path, number: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (out / "results.json").exists() or len(episodes(out)) < number:
        assert time.monotonic() < deadline
        assert evaluation.poll() is None, evaluation.communicate()
        time.sleep(0.1)
