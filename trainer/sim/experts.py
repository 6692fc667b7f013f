"""Scripted experts: state -> action, one pure function per task.

Each uses only the current privileged state. So it has an action for any state (after noise, or after a policy's mistake in
DAgger), and always the same one. The stages ("above it", "go down", "grip") are regions of the state, not a counter. An action is
described in `trainer/sim/environment.py`; `(dx, dy, dz, droll, dpitch, dyaw, gripper)`.
"""

from collections.abc import Callable

import numpy as np

from trainer.sim.environment import ACTION_WIDTH, FloatArray, PrivilegedState

OPEN, CLOSED = 1.0, -1.0
METRES_PER_UNIT = 0.1
RADIANS_PER_UNIT = -0.1  # the sign is ManiSkill's: the action is multiplied by the lower bound of the rotation
HALF_CUBE = 0.02

Expert = Callable[[PrivilegedState], FloatArray]
"""float64[7] in [-1, 1], rounded to 6 decimals, from the state."""


def push_cube(state: PrivilegedState) -> FloatArray:
    """Goes behind the cube (towards the robot) with closed fingers, then forward."""
    return _shove(state, direction=1.0)


def pull_cube(state: PrivilegedState) -> FloatArray:
    """Goes beyond the cube with closed fingers, then back towards the robot."""
    return _shove(state, direction=-1.0)


def pick_cube(state: PrivilegedState) -> FloatArray:
    """Grips the cube and carries it to the goal in a straight line; slower near the end, as a step covers what is left."""
    if not state.is_grasped:
        return _grip(state, turn=0.0)  # its diagonal fits between the fingers
    return _action(state.goal - state.cube, CLOSED, limit=0.8)


def stack_cube(state: PrivilegedState) -> FloatArray:
    """Grips the cube along its sides, lifts it over the other one, sets it down, lets go, and leaves upwards."""
    to_goal = state.goal - state.cube
    sideways = float(np.hypot(to_goal[0], to_goal[1]))
    is_on_top = sideways < 0.03 and abs(-to_goal[2] - 2 * HALF_CUBE) < 0.006
    if is_on_top and not state.is_grasped:
        return _action(np.array([0.0, 0.0, 0.06 if state.tcp[2] < 0.18 else 0.0]), OPEN)
    if is_on_top and sideways < 0.012:
        return _action(np.zeros(3), OPEN)
    if not state.is_grasped:
        # A cube looks the same every quarter turn, so the nearest side is never more than 45 degrees away.
        return _grip(state, turn=(state.cube_yaw - state.finger_yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    # Above the other cube by as much as it is still away sideways: lower only when nearly there.
    move = to_goal + np.array([0.0, 0.0, 2 * HALF_CUBE + min(0.05, 4 * max(0.0, sideways - 0.006))])
    if sideways > 0.05 and -to_goal[2] < 0.06:
        move[:2] = 0.0  # too low to pass over the other cube: straight up first
    return _action(move, CLOSED, limit=0.7)


EXPERTS: dict[str, Expert] = {
    "PushCube-v1": push_cube,
    "PickCube-v1": pick_cube,
    "PullCube-v1": pull_cube,
    "StackCube-v1": stack_cube,
    "StackGreenOnRed-v1": stack_cube,
}
"""Task id -> its expert."""


def _shove(state: PrivilegedState, *, direction: float) -> FloatArray:
    """Moves the cube along x (`direction` +1 forward, -1 back) with the closed fingers in the cube's track.

    Pushed off the track by noise, the hand goes back behind the cube; it stops 3 cm before the goal's middle, where the cube lies
    on it.
    """
    behind_by = direction * (state.cube[0] - state.tcp[0])
    aside = state.cube[1] - state.tcp[1]
    if behind_by > HALF_CUBE and abs(aside) < 0.015 and state.tcp[2] < 0.045:
        ahead = state.goal[0] - direction * 0.03 - state.tcp[0]
        return _action(np.array([ahead, aside, HALF_CUBE - state.tcp[2]]), CLOSED, limit=0.8)
    # Not behind it yet: above the cube on the way there, down only when nearly there.
    height = 0.11 if behind_by < 0.045 else HALF_CUBE
    start = np.array([state.cube[0] - direction * 0.07, state.cube[1], height])
    return _action(start - state.tcp, CLOSED)


def _grip(state: PrivilegedState, *, turn: float) -> FloatArray:
    """Opens, turns the fingers by `turn` radians, goes over the cube, down, and closes."""
    to_cube = state.cube - state.tcp
    sideways = float(np.hypot(to_cube[0], to_cube[1]))
    if sideways < 0.012 and abs(to_cube[2]) < 0.012:
        return _action(np.zeros(3), CLOSED)
    # Above the cube by as much as it is still away sideways.
    height = min(0.08, 3 * max(0.0, sideways - 0.008))
    if sideways > 0.05 and to_cube[2] > -0.05:
        to_cube = to_cube * np.array([0.2, 0.2, 1.0])  # low and far: up first, or the hand sweeps cubes away
    return _action(to_cube + np.array([0.0, 0.0, height]), OPEN, turn=turn, limit=0.8)


def _action(move: FloatArray, gripper: float, *, turn: float = 0.0, limit: float = 1.0) -> FloatArray:
    """The action that moves by `move` metres and turns by `turn` radians about the vertical, as far as one step can."""
    action = np.zeros(ACTION_WIDTH)
    translation = np.asarray(move) / METRES_PER_UNIT
    # Scaled as a whole, not clipped per axis: the hand then moves in a straight line.
    action[:3] = translation * min(1.0, limit / max(float(np.abs(translation).max()), 1e-9))
    action[5] = np.clip(turn / RADIANS_PER_UNIT, -1.0, 1.0)
    action[6] = gripper
    # Rounded before it is executed, so that the six decimals in the JSONL are exactly what the robot did.
    return np.round(action, 6) + 0.0  # + 0.0 turns -0.0 into 0.0
