"""The simulator itself: experts succeed, collections are the same bytes, Ctrl-C leaves no half."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stoker_proto.images.views import hand_pixel
from trainer.sim.collect import MAX_STEPS
from trainer.sim.demonstration import Job, play
from trainer.sim.environment import ACTION_WIDTH, TASKS, Environment
from trainer.sim.recording import read_npz

DEADLINE_S = 900
SHIPPED = Path(__file__).resolve().parents[2] / "data" / "maniskill"

Collector = Callable[..., subprocess.Popen[str]]

pytestmark = [
    pytest.mark.process,
    pytest.mark.simulator,
    pytest.mark.usefixtures("simulator"),
    # The simulator's own libraries warn (deprecations); what they warn about is not ours to mend.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(2 * DEADLINE_S),
]


@pytest.fixture(scope="module", params=list(TASKS))
def environment(request: pytest.FixtureRequest) -> Iterator[Environment]:
    """One environment per task, one after the other."""
    made = Environment(request.param, image_size=32, depth=True)
    yield made
    made.close()


@pytest.mark.parametrize("seed", [0, 8, 4242])  # PickCube 8: the cube starts at its goal
def test_expert_succeeds_and_is_recorded_as_promised(environment: Environment, seed: int) -> None:
    trajectory = play(environment, Job(task=environment.task, seed=seed, image_size=32, depth=True))
    assert not isinstance(trajectory, str), f"{environment.task} seed {seed}: {trajectory}"
    if environment.task == "PickCube-v1":
        assert environment.state().is_grasped
    steps = len(trajectory.actions)
    assert {name: (array.dtype.name, array.shape) for name, array in trajectory.observations.items()} == {
        "rgb": ("uint8", (steps, 32, 32, 3)),
        "depth": ("uint16", (steps, 32, 32)),
        "qpos": ("float32", (steps, 9)),
        "tcp_pose": ("float32", (steps, 7)),
        "state": ("float32", (steps, 9)),
        "intrinsic_cv": ("float32", (steps, 3, 3)),
        "extrinsic_cv": ("float32", (steps, 3, 4)),
        "objects": ("float32", (steps, 8)),
    }
    assert trajectory.extra == {}
    assert trajectory.actions.shape == (steps, ACTION_WIDTH)
    assert np.abs(trajectory.actions).max() <= 1


def test_the_cameras_matrices_say_where_things_are(environment: Environment) -> None:
    """A fixed view of one pixel where the cube's centre is projected shows the cube's colour."""
    strongest = {"PushCube-v1": 2, "PullCube-v1": 2, "PickCube-v1": 0, "StackCube-v1": 0}.get(environment.task, 1)
    for seed in (3, 4):
        seen = environment.reset(seed)
        cube = np.array([*environment.state().cube, 1, 0, 0, 0], np.float32)
        row, column = hand_pixel(
            {"tcp_pose": cube, "intrinsic_cv": seen.intrinsic_cv, "extrinsic_cv": seen.extrinsic_cv}
        )
        colour = seen.rgb[row, column].astype(int)
        others = np.delete(colour, strongest)
        assert colour[strongest] > others.max() + 30, (seed, row, column, colour)


@pytest.mark.parametrize("seed", [31, 33])
def test_a_noisy_partly_rendered_episode_replays_to_success(environment: Environment, seed: int) -> None:
    job = Job(
        task=environment.task, seed=seed, image_size=32, noise=1.0, render_share=0.5, settle=3, max_steps=MAX_STEPS
    )
    trajectory = play(environment, job)
    assert not isinstance(trajectory, str), f"{environment.task} seed {seed}: {trajectory}"
    executed, timesteps = trajectory.extra["executed_actions"], trajectory.extra["timesteps"]
    assert len(timesteps) == len(trajectory.actions) == len(trajectory.observations["rgb"]) < len(executed)
    assert (trajectory.actions != np.array(executed)[timesteps]).any()  # labels are the expert's
    environment.begin(seed)
    successes = [environment.advance(action) for action in executed]
    assert any(successes[-4:]), successes


def test_same_seed_is_bitwise_the_same_whatever_ran_before(environment: Environment) -> None:
    first = environment.reset(7)
    for _ in range(3):
        environment.step([0.3, -0.2, -0.5, 0, 0, 0.4, -1])
    environment.reset(8)
    again = environment.reset(7)
    np.testing.assert_array_equal(first.rgb, again.rgb)
    np.testing.assert_array_equal(first.qpos, again.qpos)


def test_shipped_actions_succeed_when_replayed(environment: Environment) -> None:
    rows = [json.loads(line) for line in (SHIPPED / "val.jsonl").read_text().splitlines()]
    row = next((row for row in rows if row["task"] == environment.task), None)
    if row is None:
        pytest.skip(f"the repository carries no demonstrations of {environment.task}")
    shipped_qpos = read_npz(SHIPPED / row["obs_path"])["qpos"]
    observation = environment.reset(row["seed"])
    assert environment.instruction() == row["instruction"]
    success = False
    for action, qpos in zip(row["actions"], shipped_qpos, strict=True):
        assert not success, "the shipped trajectory goes on after its success"
        # Not bitwise: another processor may round the physics differently.
        np.testing.assert_allclose(observation.qpos, qpos, atol=2e-3)
        observation, success = environment.step(action)
    assert success


def test_two_tasks_have_one_scene_and_each_expert_does_what_its_instruction_says() -> None:
    made = {task: Environment(task, image_size=32) for task in ("StackCube-v1", "StackGreenOnRed-v1")}
    first, second = made.values()
    for seed in (5, 6):
        np.testing.assert_array_equal(first.reset(seed).rgb, second.reset(seed).rgb)
        np.testing.assert_array_equal(first.state().cube, second.state().goal)
        np.testing.assert_array_equal(first.state().goal, second.state().cube)
        # The cube to be moved comes first, so it takes the instruction to predict them.
        np.testing.assert_array_equal(first.state().objects()[:3], second.state().objects()[3:6])
        np.testing.assert_array_equal(first.state().objects()[3:6], second.state().objects()[:3])
        assert first.outcome() == second.outcome() == ""
    for task, outcome in (("StackCube-v1", "red on green"), ("StackGreenOnRed-v1", "green on red")):
        played = play(made[task], Job(task=task, seed=6, image_size=32))
        assert not isinstance(played, str), played
        assert made[task].outcome() == outcome
        assert played.instruction == f"stack the {outcome.replace('on ', 'cube on the ')} cube"
        made[task].close()


def test_the_camera_on_the_hand_sees_the_cube_that_the_hand_is_above() -> None:
    environment = Environment("PickCube-v1", image_size=32, wrist_camera=True)
    played = play(environment, Job(task="PickCube-v1", seed=3, image_size=32, wrist_camera=True))
    environment.close()
    assert not isinstance(played, str), f"the expert moves this robot too: {played}"
    seen = played.observations["wrist_rgb"].astype(int)
    assert seen.shape == (len(played.actions), 32, 32, 3)
    assert played.extra == {"robot": "panda_wristcam"}
    is_red = (seen[..., 0] > 120) & (seen[..., 1:].max(axis=-1) < 50)  # the table is brown
    share = is_red.mean(axis=(1, 2))
    assert share[-1] > 0.03, "the red cube is between the fingers at the end"
    assert share[-1] > 2 * share[0], "and was far away at first"
    assert (played.observations["rgb"][-1].astype(int) != seen[-1]).any()


def test_one_and_two_processes_give_the_same_bytes(collector: Collector, tmp_path: Path) -> None:
    outs = {processes: tmp_path / str(processes) for processes in (1, 2)}
    for processes, out in outs.items():
        process = collector(
            *("--task", "PickCube-v1", "--task", "PushCube-v1", "--num", 2, "--seed", 11, "--image-size", 32),
            *("--depth", "--processes", processes, "--out", out, "--quiet"),
        )
        output, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, errors
        assert output == f"4 complete trajectories in {out}/train.jsonl\n"
    one, two = ({str(path.relative_to(out)): path.read_bytes() for path in _files(out)} for out in outs.values())
    assert sorted(one) == ["train.jsonl", *(f"train/traj_{index:06d}/obs.npz" for index in range(4))]
    assert one == two


@pytest.mark.parametrize("after_lines", [0, 2])
def test_ctrl_c_leaves_only_complete_trajectories(collector: Collector, tmp_path: Path, after_lines: int) -> None:
    jsonl = tmp_path / "out" / "train.jsonl"
    process = collector("--task", "PushCube-v1", "--num", 5000, "--image-size", 32, "--out", jsonl.parent)
    deadline = time.monotonic() + DEADLINE_S
    if after_lines:
        while not jsonl.exists() or jsonl.read_bytes().count(b"\n") < after_lines:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no trajectory in time"
            time.sleep(0.05)
    else:
        # Before anything was written: as soon as the progress bar shows that the workers are being started.
        assert process.stderr is not None
        process.stderr.read(1)
    for _ in range(2):  # a terminal sends it to the whole group; an impatient user sends it twice
        os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    if after_lines:
        _assert_complete(jsonl, errors)
    else:
        assert "no trajectory was written" in errors
        assert _files(tmp_path) == []
    while _group_lives(process.pid):
        assert time.monotonic() < deadline, "a worker process outlives the collector"
        time.sleep(0.05)


def _assert_complete(jsonl: Path, errors: str) -> None:
    rows = [json.loads(line) for line in jsonl.read_text().splitlines()]
    assert f"interrupted; {len(rows)} complete trajectories in {jsonl}" in errors
    assert [row["seed"] for row in rows] == list(range(len(rows)))
    for row in rows:
        assert len(read_npz(jsonl.parent / row["obs_path"])["rgb"]) == len(row["actions"])
    assert set(_files(jsonl.parent)) == {jsonl, *(jsonl.parent / row["obs_path"] for row in rows)}


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
