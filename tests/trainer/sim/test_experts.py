"""The experts without a simulator: pure functions whose answers can be reckoned by hand."""

import dataclasses

import numpy as np
import pytest

from trainer.sim.environment import TASKS, PrivilegedState
from trainer.sim.experts import EXPERTS, pick_cube, push_cube, stack_cube


def state(tcp: tuple[float, float, float], **changes: object) -> PrivilegedState:
    """A cube at (0.05, 0, 0.02), square to the fingers, not held, its goal 0.2 m forward."""
    usual = PrivilegedState(
        tcp=np.array(tcp),
        finger_yaw=0.0,
        cube=np.array([0.05, 0.0, 0.02]),
        cube_yaw=0.0,
        goal=np.array([0.25, 0.0, 0.02]),
        is_grasped=False,
    )
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]  # the tests pass what the fields take


def test_there_is_an_expert_for_each_task() -> None:
    assert list(EXPERTS) == list(TASKS)


def test_push_goes_forward_once_behind_the_cube() -> None:
    np.testing.assert_array_equal(push_cube(state((-0.01, 0.0, 0.02))), [0.8, 0, 0, 0, 0, 0, -1])


def test_push_keeps_above_the_cube_until_behind_it() -> None:
    action = push_cube(state((0.05, 0.0, 0.07)))
    assert action[0] < 0
    assert action[2] >= 0


def test_stack_turns_by_the_nearer_quarter_and_against_the_sign() -> None:
    # The cube's side is 100 degrees away: the same cube is 10 degrees (0.174533 rad) away; -0.1 rad is one unit.
    action = stack_cube(state((0.05, 0.0, 0.2), cube_yaw=np.deg2rad(100)))
    assert action[5] == -1.0
    action = stack_cube(state((0.05, 0.0, 0.2), cube_yaw=np.deg2rad(92)))
    assert action[5] == pytest.approx(-0.349066)
    assert pick_cube(state((0.05, 0.0, 0.2), cube_yaw=np.deg2rad(92)))[5] == 0


def test_push_returns_behind_a_cube_that_noise_left_beside_the_hand() -> None:
    # Beside the cube, low: up and back, not sideways into it.
    action = push_cube(state((0.05, 0.04, 0.02)))
    assert action[0] < 0
    assert action[2] > 0
    # Past the goal's near edge it stops: the cube lies on it.
    np.testing.assert_allclose(
        push_cube(state((0.22, 0.0, 0.02), cube=np.array([0.26, 0.0, 0.02]))), [0, 0, 0, 0, 0, 0, -1]
    )


def test_pick_closes_only_around_the_cube_and_then_carries_straight() -> None:
    np.testing.assert_array_equal(pick_cube(state((0.05, 0.0, 0.02))), [0, 0, 0, 0, 0, 0, -1])
    assert pick_cube(state((0.05, 0.0, 0.06)))[6] == 1
    carried = pick_cube(state((0.05, 0.0, 0.02), is_grasped=True, goal=np.array([0.15, 0.05, 0.22])))
    np.testing.assert_allclose(carried, [0.4, 0.2, 0.8, 0, 0, 0, -1])


def test_stack_lets_go_only_on_top() -> None:
    below = np.array([0.05, 0.0, 0.02])
    on_top = np.array([0.05, 0.0, 0.06])
    assert stack_cube(state((0.05, 0.0, 0.06), cube=on_top, goal=below, is_grasped=True))[6] == 1
    above = np.array([0.05, 0.0, 0.08])
    lowering = stack_cube(state((0.05, 0.0, 0.08), cube=above, goal=below, is_grasped=True))
    np.testing.assert_allclose(lowering, [0, 0, -0.2, 0, 0, 0, -1])


@pytest.mark.parametrize("task", list(TASKS))
def test_answers_are_legal_and_depend_on_the_state_alone(task: str) -> None:
    seed = 20
    random = np.random.default_rng(seed)
    for index in range(300):
        asked = PrivilegedState(
            tcp=random.uniform([-0.3, -0.3, 0.0], [0.3, 0.3, 0.4]),
            finger_yaw=random.uniform(-np.pi, np.pi),
            cube=random.uniform([-0.2, -0.2, 0.02], [0.2, 0.2, 0.3]),
            cube_yaw=random.uniform(-np.pi, np.pi),
            goal=random.uniform([-0.2, -0.2, 0.02], [0.2, 0.2, 0.3]),
            is_grasped=bool(random.integers(2)),
        )
        action = EXPERTS[task](asked)
        assert action.shape == (7,), f"seed {seed}, state {index}"
        assert np.abs(action).max() <= 1, f"seed {seed}, state {index}"
        assert action[6] in (-1, 1), f"seed {seed}, state {index}"
        np.testing.assert_array_equal(action, action.round(6))
        np.testing.assert_array_equal(action, EXPERTS[task](asked))
