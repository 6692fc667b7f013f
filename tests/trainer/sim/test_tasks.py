"""Environments by name: ours, a user's, and any gymnasium environment behind the adapter."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker_proto.errors import ConfigError
from tests.trainer.sim.pushing import Pushing
from tests.trainer.sim.put_on_plate import MODE, PutOnPlateInScene
from trainer.sim.environment import TASKS
from trainer.sim.tasks.gym_task import Conventions, GymTask
from trainer.sim.tasks.interface import Rendering
from trainer.sim.tasks.registry import check_task, load_modules, make_task, register, task_names
from trainer.sim.tasks.shipped import MAX_STEPS

NAME = "PutOnPlateInScene25Main-v3"


def test_our_tasks_are_those_of_the_collector() -> None:
    assert set(MAX_STEPS) == set(TASKS)
    assert task_names()[:4] == ["PushCube-v1", "PickCube-v1", "PullCube-v1", "StackCube-v1"]
    for task in TASKS:
        check_task(task)


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'PushCube'; known: PushCube-v1, .*pushing.*--env-module"):
        make_task("PushCube", Rendering())


@pytest.mark.parametrize("name", ["PushCube-v1", "pushing"])
def test_a_name_is_registered_once(name: str) -> None:
    with pytest.raises(ConfigError, match="registered already"):
        register(name)(PutOnPlate)
    assert type(make_task("pushing", Rendering(image_size=8))) is Pushing


class PutOnPlate(Pushing):
    """Another class."""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "No module named 'my_absent_envs'"),
        ("import my_other_absent_module", "No module named 'my_other_absent_module'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def", "SyntaxError"),
    ],
)
def test_a_module_that_cannot_be_imported(
    source: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "my_absent_envs" if source is None else f"my_envs_{abs(hash(source))}"
    if source is not None:
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"--env-module {name}: importing it failed .*{message}") as info:
        load_modules([name])
    assert "\n" not in str(info.value)


def test_the_interface_of_put_on_plate() -> None:
    load_modules(["tests.trainer.sim.put_on_plate"])
    environment = make_task(NAME, Rendering())
    assert (environment.cameras, environment.control_mode) == (("3rd_view_camera",), MODE)
    assert (environment.action_width, environment.max_steps) == (7, 80)
    view = environment.reset(5)
    assert environment.instruction() == "put object 5 on plate"
    [picture] = view.images
    assert (picture.dtype, picture.shape, int(picture[0, 0, 0])) == (np.uint8, (48, 64, 3), 5)
    assert {name: (values.dtype, values.shape) for name, values in view.states.items()} == {"qpos": (np.float32, (8,))}
    outcomes = [environment.step(np.array([0, 0, 0.25, 0, 0, 0, grip], np.float32)) for grip in (0.2, 0.7, 0.2)]
    assert [(one.success, one.reward) for one in outcomes] == [(False, 0.25), (True, 0.5), (False, 0.75)]
    environment.close()


def test_a_camera_that_the_environment_does_not_have() -> None:
    made = PutOnPlateInScene(num_envs=1, control_mode=MODE)
    conventions = Conventions(reset_options={"obj_set": "test"})
    task = GymTask(made, cameras=("wrist",), control_mode=MODE, action_width=7, max_steps=80, conventions=conventions)
    with pytest.raises(ConfigError, match=r"no camera wrist; it has 3rd_view_camera"):
        task.reset(0)
    task.close()
    assert not made.is_open


class Plain:
    """A gymnasium environment without batches."""

    def reset(self, *, seed: int, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        return self._seen(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        return self._seen(), 0.5, False, False, {"success": True}

    def _seen(self) -> dict[str, Any]:
        return {"agent": {"grip": np.ones(1)}, "sensor_data": {"eye": {"rgb": np.zeros((1, 6, 4), np.uint8)}}}


def test_an_environment_without_batches() -> None:
    task = GymTask(
        Plain(),
        cameras=("eye",),
        control_mode="x",
        action_width=1,
        max_steps=5,
        conventions=Conventions(instruction=lambda _: "go", batched=False),
    )
    view = task.reset(0)
    assert (view.images[0].shape, view.states["grip"].shape, task.instruction()) == ((1, 6, 3), (1,), "go")
    step = task.step(np.zeros(1, np.float32))
    assert (step.success, step.reward) == (True, 0.5)
