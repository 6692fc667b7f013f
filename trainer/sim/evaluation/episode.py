"""The rules of one episode, without a simulator: what the policy is told, when it acts, when the episode ends.

    first success at step 12   ->   the episode goes on to step 22, and success *at the end* is the success of step 22
    no success                 ->   it ends at the limit
    first success at 47 of 50  ->   it ends at step 50

Steps count from 1: step 1 is the result of the first action.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.policy_io import PolicyInput, Prediction
from trainer.sim.tasks.interface import Step, View

SETTLE_STEPS = 10
"""Steps after the first success until success *at the end* is read: a cube that was pushed too hard has rolled off by then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One episode to be played."""

    task: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeResult:
    """What came of one episode, as it stands in the JSON."""

    task: str
    seed: int
    instruction: str
    success_once: bool
    """At any step."""
    success_at_end: bool
    """At the last step."""
    steps: int
    """Steps played."""
    steps_to_success: int | None
    """The step of the first success."""
    reward: float
    """Mean reward of a step."""
    outside_mass: float
    """Probability that the policy gave to tokens that are no action tokens, mean over its predictions."""
    outcome: str = ""
    """What had been done at the last step, where the scene has several valid instructions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """How episodes are played; two evaluations are comparable only if these are equal."""

    execute: int
    """Actions of a predicted chunk that are executed before the policy looks again."""
    image_history: tuple[int, ...] = (0,)
    """Timesteps whose pictures the policy sees, relative to now: `data.options.image_history` of the training."""
    state: str | None = None
    """Name of the environment's measurement that is the policy's state; None: the policy has none."""
    max_steps: int | None = None
    """Limit of an episode; None: the environment's own."""


class Episode:
    """One episode that runs. `begin`, then `observe` after each action that `next_action` returned."""

    def __init__(self, job: Job, protocol: Protocol) -> None:
        self.job = job
        self._protocol = protocol
        self._views: deque[View] = deque(maxlen=1 - min(protocol.image_history))
        self._actions: deque[NDArray[np.float32]] = deque()
        self._rewards: list[float] = []
        self._masses: list[float] = []
        self._first_success: int | None = None
        self._success = False
        self._outcome = ""

    def begin(self, view: View, instruction: str, max_steps: int) -> None:
        """The environment was reset. max_steps: the environment's own limit."""
        self.instruction = instruction
        self._limit = self._protocol.max_steps or max_steps
        self._views.append(view)

    @property
    def needs_prediction(self) -> bool:
        """Whether the policy must look before the next action."""
        return not self._actions

    def policy_input(self) -> PolicyInput:
        """All that the policy is told now. Before the first view there is none, so that one stands for earlier timesteps."""
        newest = len(self._views) - 1
        moments = [self._views[max(0, newest + offset)] for offset in self._protocol.image_history]
        num_cameras = len(self._views[-1].images)
        images = [moment.images[camera] for camera in range(num_cameras) for moment in moments]
        name = self._protocol.state
        state = None if name is None else self._views[-1].states[name]
        measured = self._views[-1].states
        return PolicyInput(images=images, instruction=self.instruction, state=state, measurements=measured)

    def predicted(self, prediction: Prediction) -> None:
        """Take the first `execute` actions of a chunk."""
        self._actions.extend(prediction.actions[: self._protocol.execute])
        self._masses.append(prediction.outside_mass)

    def next_action(self) -> NDArray[np.float32]:
        """float32[D]: the next action of the chunk."""
        return self._actions.popleft()

    def observe(self, step: Step) -> bool:
        """The result of an action; True if the episode is over."""
        self._views.append(step.view)
        self._rewards.append(step.reward)
        self._success, self._outcome = step.success, step.outcome
        num_steps = len(self._rewards)
        if step.success and self._first_success is None:
            self._first_success = num_steps
        settled = self._first_success is not None and num_steps - self._first_success >= SETTLE_STEPS
        return settled or num_steps >= self._limit

    @property
    def images(self) -> Sequence[NDArray[np.uint8]]:
        """The pictures of the newest view."""
        return self._views[-1].images

    def result(self) -> EpisodeResult:
        """Of the episode as far as it was played."""
        return EpisodeResult(
            task=self.job.task,
            seed=self.job.seed,
            instruction=self.instruction,
            success_once=self._first_success is not None,
            success_at_end=self._success,
            steps=len(self._rewards),
            steps_to_success=self._first_success,
            reward=float(np.mean(self._rewards)),
            outside_mass=float(np.mean(self._masses)),
            outcome=self._outcome,
        )
