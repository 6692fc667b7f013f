"""What becomes a demonstration, in a pure-Python table: labels, noise, partial rendering, stuck episodes, DAgger."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from trainer.sim.demonstration import Job, play
from trainer.sim.environment import Observation, PrivilegedState
from trainer.sim.experts import push_cube
from trainer.sim.noise import Noise
from trainer.sim.recording import Trajectory


class Table:
    """A cube that moves with the hand behind it. `glue`: the hand does not move at all."""

    def __init__(self, *, glue: bool = False) -> None:
        self.glue = glue
        self.num_rendered = 0

    def begin(self, seed: int) -> None:
        self.tcp, self.cube = np.array([-0.1, 0.0, 0.15]), np.array([0.0, 0.01 * (seed % 5), 0.02])

    def instruction(self, number: int = 0) -> str:
        return f"push it, said {number}"

    def state(self) -> PrivilegedState:
        goal = np.array([0.2, 0.0, 0.02])
        return PrivilegedState(
            tcp=self.tcp.copy(), finger_yaw=0, cube=self.cube.copy(), cube_yaw=0, goal=goal, is_grasped=False
        )

    def observe(self) -> Observation:
        self.num_rendered += 1
        place = np.array([*self.tcp, 1, 0, 0, 0], np.float32)
        return Observation(
            rgb=np.zeros((4, 4, 3), np.uint8), depth=None, qpos=np.zeros(9, np.float32), tcp_pose=place,
            state=np.zeros(9, np.float32), intrinsic_cv=np.eye(3, dtype=np.float32),
            extrinsic_cv=np.zeros((3, 4), np.float32),
        )  # fmt: skip

    def advance(self, action: Any) -> bool:
        before = self.tcp.copy()
        self.tcp += (0.0 if self.glue else 0.05) * np.asarray(action)[:3]
        touches = abs(self.tcp[1] - self.cube[1]) < 0.03 and self.tcp[2] < 0.05 and before[0] < self.cube[0]
        if touches and self.tcp[0] > self.cube[0] - 0.03:
            self.cube[0] = self.tcp[0] + 0.03
        return bool(abs(self.cube[0] - 0.2) < 0.05)


def job(**changes: Any) -> Job:
    return Job(**{"task": "PushCube-v1", "seed": 3, "image_size": 4, **changes})


def played(table: Table, one: Job, act: Any = None) -> Trajectory:
    found = play(table, one, act)  # type: ignore[arg-type]  # the part of an Environment that it uses
    assert isinstance(found, Trajectory), found
    return found


def test_a_plain_episode_is_the_experts_and_ends_at_success() -> None:
    table = Table()
    found = played(table, job())
    assert found.extra == {}
    assert found.instruction == "push it, said 0"
    assert table.num_rendered == len(found.actions)
    settled = played(Table(), job(settle=4, paraphrases=True))
    assert len(settled.actions) == len(found.actions) + 4
    assert settled.instruction == "push it, said 3"
    np.testing.assert_array_equal(settled.actions[: len(found.actions)], found.actions)


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_executed_and_the_experts_action_is_the_label(seed: int) -> None:
    table = Table()
    found = played(table, job(seed=seed, noise=1.0, render_share=0.5))
    executed, timesteps = np.array(found.extra["executed_actions"]), found.extra["timesteps"]
    assert found.extra["acted"] == "noisy expert"
    assert timesteps[0] == 0
    assert table.num_rendered == len(timesteps) == len(found.actions) < len(executed)
    # Replayed, the executed actions lead through states whose expert action is the label.
    again = Table()
    again.begin(seed)
    labels = []
    for action in executed:
        labels.append(push_cube(again.state()))
        again.advance(action)
    np.testing.assert_array_equal(found.actions, np.stack(labels)[timesteps])
    assert np.abs(executed).max() <= 1
    assert (executed != np.stack(labels)).any()


def test_the_same_seed_plays_the_same_episode() -> None:
    one, two = (played(Table(), job(seed=6, noise=0.75, render_share=0.5)) for _ in range(2))
    np.testing.assert_array_equal(one.actions, two.actions)
    assert one.extra == two.extra


def test_stuck_and_failed_episodes_say_why() -> None:
    table = Table(glue=True)
    assert play(table, job()) == "stuck"  # type: ignore[arg-type]
    assert table.num_rendered == 15  # it does not wait for the limit
    assert play(Table(), job(max_steps=3)) == "failed"  # type: ignore[arg-type]


def test_with_a_policy_the_expert_labels_what_the_policy_leads_to() -> None:
    asked: list[str] = []

    def act(seen: Observation, instruction: str) -> np.ndarray:
        asked.append(instruction)
        return np.array([0.0, 0.9, 3.0, 0, 0, 0, 1])  # wrong, and out of range

    found = played(Table(), job(seed=2, render_share=0.0, max_steps=40, policy="an/export"), act)
    executed = np.array(found.extra["executed_actions"])
    by_policy = (executed == [0.0, 0.9, 1.0, 0, 0, 0, 1]).all(axis=1)
    assert len(asked) == by_policy.sum() > 5
    assert not by_policy.all()  # the expert acts in between
    assert set(np.flatnonzero(by_policy)) <= set(found.extra["timesteps"])
    assert found.extra["acted"] == "policy"
    assert not (found.actions == [0.0, 0.9, 1.0, 0, 0, 0, 1]).all(axis=1).any()  # labels are the expert's
    assert len(executed) == 40  # kept, although it failed


def test_noise_leaves_an_episode_alone_in_the_end() -> None:
    noise, action = Noise(np.random.default_rng(0)), np.array([0.5, 0, 0, 0, 0, 0, -1.0])
    executed = np.stack([noise.disturb(action) for _ in range(80)])
    assert (executed[:45] != action).any(axis=1).sum() > 5
    np.testing.assert_array_equal(executed[45:], np.tile(action, (35, 1)))
