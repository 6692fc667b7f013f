"""One demonstration: who acts, what is labelled, which frames are rendered, and when an episode is thrown away.

The label of a timestep is always the expert's action in that state. The executed action is the expert's, the expert's with noise,
or (DAgger) a policy's. With a policy, the frames show the states that its own mistakes lead to.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trainer.sim.environment import Environment, FloatArray, Observation, PrivilegedState
from trainer.sim.experts import EXPERTS
from trainer.sim.noise import Noise
from trainer.sim.recording import WRIST_ROBOT, Trajectory

_HELD_AT_THE_END = {"PickCube-v1"}
"""Its goal may lie where the cube lies: ManiSkill then calls it solved, but untouched it shows no picking."""
_STUCK_STEPS, _STUCK_METRES = 15, 0.002
_POLICY_STEPS, _EXPERT_STEPS = 15, 4
"""Mean lengths of the segments in which the policy and the expert act."""

Act = Callable[[Observation, str], FloatArray]
"""(what is seen, instruction) -> the policy's action float64[7]."""
Reason = Literal["failed", "stuck"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One episode to be played."""

    task: str
    seed: int
    image_size: int = 128
    depth: bool = False
    wrist_camera: bool = False
    """Record the camera on the hand too."""
    noise: float = 0.0
    """Probability that this episode has noise."""
    render_share: float = 1.0
    """Probability that a timestep is rendered and recorded; the first one and a policy's own always are."""
    settle: int = 0
    """Timesteps to record after the first success, so that holding still is learned too."""
    max_steps: int = 80
    paraphrases: bool = False
    """Say the instruction in the way number `seed`, rather than in the usual one."""
    policy: str | None = None
    """Folder of an export that acts (DAgger)."""


@dataclass(slots=True)
class _Record:
    """The timesteps that were rendered."""

    timesteps: list[int] = field(default_factory=list)
    seen: list[Observation] = field(default_factory=list)
    objects: list[npt.NDArray[np.float32]] = field(default_factory=list)
    labels: list[FloatArray] = field(default_factory=list)
    executed: list[FloatArray] = field(default_factory=list)
    """Of all timesteps."""


def play(environment: Environment, job: Job, act: Act | None = None) -> Trajectory | Reason:
    """Plays the job's episode. act: the policy of `job.policy`.

    Returns the reason where it is thrown away: `failed` (no success within `max_steps`, or none any more at its end) or `stuck`
    (nothing has moved for 15 timesteps: its frames would all be the same, with one label). Episodes in which a policy acts are
    kept in any case.
    """
    rng = np.random.default_rng([job.seed, 1])
    environment.begin(job.seed)
    instruction = environment.instruction(job.seed if job.paraphrases else 0)
    noise = Noise(rng) if rng.random() < job.noise and act is None else None
    turns = _Turns(rng) if act is not None else None
    record, places = _Record(), list[FloatArray]()
    first_success, success = None, False
    for timestep in range(job.max_steps):
        state = environment.state()
        places.append(np.concatenate([state.tcp, state.cube]))
        if act is None and first_success is None and _is_stuck(places):
            return "stuck"
        action = EXPERTS[job.task](state)
        # Once it has succeeded it is left alone: what is recorded then is how to hold still.
        is_disturbed = noise is not None and first_success is None
        record.executed.append(noise.disturb(action).round(6) if noise is not None and is_disturbed else action)
        policy_acts = turns is not None and turns.policy_is_next()
        if policy_acts or rng.random() < job.render_share or timestep == 0:
            seen = environment.observe()
            _add(record, timestep, seen, state, action)
            if policy_acts and act is not None:
                record.executed[-1] = np.clip(act(seen, instruction), -1.0, 1.0).round(6)
        success = environment.advance(record.executed[-1])
        success = success and (job.task not in _HELD_AT_THE_END or environment.state().is_grasped)
        if success and first_success is None:
            first_success = timestep
        if first_success is not None and timestep - first_success >= job.settle:
            break
    if not success and act is None:
        return "failed"
    return _trajectory(record, job, instruction, is_noisy=noise is not None)


class _Turns:
    """Whose turn it is in an episode of DAgger: long segments of the policy, short ones of the expert."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._is_policy = bool(rng.random() < 0.85)
        self._left = self._length()

    def policy_is_next(self) -> bool:
        """Whether the policy acts at the next timestep."""
        if self._left == 0:
            self._is_policy = not self._is_policy
            self._left = self._length()
        self._left -= 1
        return self._is_policy

    def _length(self) -> int:
        return int(self._rng.geometric(1 / (_POLICY_STEPS if self._is_policy else _EXPERT_STEPS)))


def _is_stuck(places: list[FloatArray]) -> bool:
    recent = places[-_STUCK_STEPS - 1 :]
    return len(recent) > _STUCK_STEPS and float(np.ptp(np.stack(recent), axis=0).max()) < _STUCK_METRES


def _add(record: _Record, timestep: int, seen: Observation, state: PrivilegedState, action: FloatArray) -> None:
    record.timesteps.append(timestep)
    record.seen.append(seen)
    record.objects.append(state.objects())
    record.labels.append(action)


def _trajectory(record: _Record, job: Job, instruction: str, *, is_noisy: bool) -> Trajectory:
    seen = record.seen
    members: dict[str, npt.NDArray[Any]] = {"rgb": np.stack([one.rgb for one in seen])}
    depth = [one.depth for one in seen if one.depth is not None]
    if depth:
        members["depth"] = np.stack(depth)
    wrist = [one.wrist_rgb for one in seen if one.wrist_rgb is not None]
    if wrist:
        members["wrist_rgb"] = np.stack(wrist)
    for name in ("qpos", "tcp_pose", "state", "intrinsic_cv", "extrinsic_cv"):
        members[name] = np.stack([getattr(one, name) for one in seen])
    members["objects"] = np.stack(record.objects)
    extra: dict[str, Any] = {"robot": WRIST_ROBOT} if wrist else {}
    if record.timesteps != list(range(len(record.executed))):
        extra["timesteps"] = record.timesteps
    if is_noisy or job.policy is not None or "timesteps" in extra:
        extra["executed_actions"] = np.stack(record.executed).tolist()
        extra["acted"] = "policy" if job.policy is not None else "noisy expert" if is_noisy else "expert"
    return Trajectory(
        task=job.task,
        instruction=instruction,
        seed=job.seed,
        actions=np.stack(record.labels),
        observations=members,
        extra=extra,
    )
