"""A small world of pushing, drawn with numpy, and a policy that solves it from the picture alone.

Used as `--env-module tests.trainer.sim.pushing`: it registers the tasks below. A hand (white disc) pushes a block (blue) onto
a target (red ring). Lengths are fractions of the picture's side. No simulator package is needed.

    pushing       the world
    swapped       its pictures are those of another episode's world, which the same actions move
    mute          its instruction follows the seed: three texts
    crashing      its process ends at step 3 of every odd seed
    raising       raises ValueError at step 2 of seed 1
    hanging       never answers at step 2 of seed 1
    two cameras   shows its picture twice
    gripping      succeeds only while the gripper, the third number, is closed: above 0.5
    dying         its process ends at step 2, once for each file `dying-SEED` that can be made in $DYING
    wide          actions of 4 numbers
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.policy_io import PolicyInput, Prediction
from trainer.sim.tasks.interface import Rendering, Step, View
from trainer.sim.tasks.registry import register

STRIDE = 0.03
"""Longest way of the hand in one step; an action is (dx, dy, unused) in [-1, 1] of it."""
CONTACT = 0.085
"""Distance of the centres at which hand and block touch."""
CLOSE = 0.05
"""Distance of block and target that counts as success."""
COLOURS = {"hand": (255, 255, 255), "block": (40, 80, 255), "target": (255, 40, 40)}

Point = NDArray[np.float64]


class Pushing:
    """A `TaskEnvironment`; seeds give the places of block and target, and of the hand."""

    cameras: tuple[str, ...] = ("above",)
    control_mode = "delta_xy"
    action_width = 3
    max_steps = 80

    def __init__(self, task: str, rendering: Rendering) -> None:
        self.task, self.side, self.steps = task, rendering.image_size, 0

    def reset(self, seed: int) -> View:
        random = np.random.default_rng(seed)
        self.seed, self.steps = seed, 0
        self.target = random.uniform(0.2, 0.8, 2)
        angle = random.uniform(0, 2 * np.pi)
        self.block = 0.5 + (0.2 + 0.05 * random.random()) * np.array([np.cos(angle), np.sin(angle)])
        while np.linalg.norm(self.block - self.target) < 0.2:
            self.target = random.uniform(0.2, 0.8, 2)
        self.hand = np.array([0.08, 0.08]) + random.uniform(0, 0.05, 2)
        return self.view()

    def instruction(self) -> str:
        return "push the blue disc onto the red ring"

    def step(self, action: NDArray[np.float32]) -> Step:
        self.steps += 1
        self.hand = np.clip(self.hand + STRIDE * np.clip(action[:2].astype(np.float64), -1, 1), 0, 1)
        away = self.block - self.hand
        distance = float(np.linalg.norm(away))
        if distance < CONTACT:
            self.block = self.hand + away / max(distance, 1e-9) * CONTACT
        off = float(np.linalg.norm(self.block - self.target))
        return Step(view=self.view(), success=off < CLOSE, reward=1 - off - 0.1 * distance)

    def close(self) -> None:
        pass

    def view(self) -> View:
        return View(images=(self.picture(),), states={"hand": self.hand.astype(np.float32)})

    def picture(self) -> NDArray[np.uint8]:
        rows, columns = (np.indices((self.side, self.side)) + 0.5) / self.side
        image = np.full((self.side, self.side, 3), 30, np.uint8)
        for name, centre, inner, outer in (
            ("target", self.target, 0.09, 0.12),
            ("block", self.block, 0, 0.05),
            ("hand", self.hand, 0, 0.035),
        ):
            distance = np.hypot(columns - centre[0], rows - centre[1])
            image[(distance >= inner) & (distance < outer)] = COLOURS[name]
        return image


class SwappedPushing(Pushing):
    """The actions move two worlds, one of them is seen, the other one counts."""

    def reset(self, seed: int) -> View:
        self.seen = Pushing(self.task, Rendering(image_size=self.side))
        self.seen.reset(seed + 500_000)
        return super().reset(seed)

    def step(self, action: NDArray[np.float32]) -> Step:
        self.seen.step(action)
        return super().step(action)

    def picture(self) -> NDArray[np.uint8]:
        return self.seen.picture()


class MutePushing(Pushing):
    """Three instructions."""

    def instruction(self) -> str:
        return ("push it", "shove it", "move it")[self.seed % 3]


class CrashingPushing(Pushing):
    """Takes its process with it."""

    def step(self, action: NDArray[np.float32]) -> Step:
        if self.seed % 2 and self.steps == 2:
            os._exit(7)
        return super().step(action)


class RaisingPushing(Pushing):
    """Has a mistake."""

    def step(self, action: NDArray[np.float32]) -> Step:
        if self.seed == 1 and self.steps == 1:
            raise ValueError("the gripper is not a number")
        return super().step(action)


class HangingPushing(Pushing):
    """Stops answering."""

    def step(self, action: NDArray[np.float32]) -> Step:
        if self.seed == 1 and self.steps == 1:
            threading.Event().wait()
        return super().step(action)


class TwoCameras(Pushing):
    """The same picture twice."""

    cameras = ("above", "again")

    def view(self) -> View:
        return View(images=(self.picture(), self.picture()))


class GrippingPushing(Pushing):
    """The gripper counts."""

    def step(self, action: NDArray[np.float32]) -> Step:
        step = super().step(action)
        return replace(step, success=step.success and float(action[2]) > 0.5)


class DyingPushing(Pushing):
    """Succeeds in the second try."""

    def step(self, action: NDArray[np.float32]) -> Step:
        mark = Path(os.environ["DYING"]) / f"dying-{self.seed}"
        if self.steps == 1 and not mark.exists():
            mark.touch()
            os._exit(7)
        return super().step(action)


class WidePushing(Pushing):
    """Actions of another width."""

    action_width = 4


register("pushing")(Pushing)
register("swapped")(SwappedPushing)
register("mute")(MutePushing)
register("crashing")(CrashingPushing)
register("raising")(RaisingPushing)
register("hanging")(HangingPushing)
register("two cameras")(TwoCameras)
register("gripping")(GrippingPushing)
register("dying")(DyingPushing)
register("wide")(WidePushing)


class Reader:
    """A policy that reads the picture: it goes behind the block, round it where it stands in the way, and pushes."""

    def __init__(self) -> None:
        self.inputs: list[PolicyInput] = []
        """All that it was told."""

    def predict(self, inputs: Sequence[PolicyInput]) -> list[Prediction]:
        self.inputs += inputs
        return [
            Prediction(actions=self._move(one)[None], ids=np.zeros(0, np.int64), outside_mass=0.0) for one in inputs
        ]

    def _move(self, one: PolicyInput) -> NDArray[np.float32]:
        [image] = one.images
        hand, block, target = (_centre(image, COLOURS[name]) for name in ("hand", "block", "target"))
        if hand is None or block is None or target is None:
            return np.zeros(3, np.float32)
        push = (target - block) / max(float(np.linalg.norm(target - block)), 1e-9)
        start = block - push * (CONTACT + 0.02)
        side = hand - block
        behind = -float(side @ push)
        aside = float(np.linalg.norm(side + behind * push))
        if behind > 0.5 * CONTACT and aside < 0.02:
            goal = hand + push * min(STRIDE, float(np.linalg.norm(target - block)))
        elif behind > 0.8 * CONTACT or np.linalg.norm(start - hand) < STRIDE:
            goal = start
        else:  # round the block, at a distance
            across = np.array([-push[1], push[0]])
            across = across if side @ across >= 0 else -across
            goal = block + across * (CONTACT + 0.06) - push * (0.0 if aside < CONTACT + 0.03 else CONTACT + 0.02)
        move = (goal - hand) / STRIDE
        return np.append(move / max(1.0, float(np.abs(move).max())), 0).astype(np.float32)


def _centre(image: NDArray[np.uint8], colour: tuple[int, int, int]) -> Point | None:
    """(x, y) of the middle of the pixels of a colour."""
    rows, columns = np.nonzero((image == np.array(colour, np.uint8)).all(axis=-1))
    return None if not len(rows) else (np.array([columns.mean(), rows.mean()]) + 0.5) / len(image)
