"""Scripted experts: state -> action, one pure function per task.

Each looks only at the privileged state of this moment, so it can be asked in any state (after noise, after a policy's
mistake: DAgger) and always answers the same. The stages ("above it", "go down", "grip") are regions of the state, not
a counter. An action is described in `trainer/sim/environment.py`; `(dx, dy, dz, droll, dpitch, dyaw, gripper)`.
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
    """Grips the cube and carries it to the goal in a straight line, slower near the end: it must come to rest."""
    if not state.is_grasped:
        return _grip(state)
    return _action(state.goal - state.cube, CLOSED, limit=0.6)


def stack_cube(state: PrivilegedState) -> FloatArray:
    """Grips the cube, lifts it over the other one, sets it down, lets go."""
    offset = state.goal + np.array([0.0, 0.0, 2 * HALF_CUBE]) - state.cube
    sideways = float(np.hypot(offset[0], offset[1]))
    if sideways < 0.015 and abs(offset[2]) < 0.004:
        # It stands where it should: let go and leave upwards (also once released, so it is not gripped again).
        return _action(np.array([0.0, 0.0, 0.0 if state.is_grasped else 0.03]), OPEN)
    if not state.is_grasped:
        return _grip(state)
    if sideways < 0.01:
        return _action(offset - np.array([0.0, 0.0, 0.001]), CLOSED, limit=0.3)
    clearance = 0.03
    lift = offset[2] + clearance
    if lift > 0.015:
        # Too low to pass over the other cube: straight up first.
        return _action(np.array([0.0, 0.0, lift]), CLOSED, limit=0.6)
    return _action(np.array([offset[0], offset[1], lift]), CLOSED, limit=0.6)


EXPERTS: dict[str, Expert] = {
    "PushCube-v1": push_cube,
    "PickCube-v1": pick_cube,
    "PullCube-v1": pull_cube,
    "StackCube-v1": stack_cube,
}
"""Task id -> its expert."""


def _shove(state: PrivilegedState, *, direction: float) -> FloatArray:
    """Moves the cube along x (`direction` +1 forward, -1 back) with the closed fingers in the cube's track."""
    start = state.cube - np.array([direction * (HALF_CUBE + 0.04), 0.0, 0.0])
    behind_by = direction * (state.cube[0] - state.tcp[0])
    aside = abs(state.tcp[1] - state.cube[1])
    height = state.tcp[2] - state.cube[2]
    if behind_by > HALF_CUBE and aside < 0.012 and height < 0.015:
        ahead = np.array([direction * 0.1, state.cube[1] - state.tcp[1], -height])
        return _action(ahead, CLOSED, limit=0.8)
    if np.hypot(*(start - state.tcp)[:2]) < 0.02:
        return _action(start - state.tcp, CLOSED)
    # Not behind it yet: stay above the cube on the way there, lower only when nearly there.
    over = start + np.array([0.0, 0.0, 0.05])
    return _action(over - state.tcp, CLOSED)


def _grip(state: PrivilegedState) -> FloatArray:
    """Opens, turns the fingers along a side of the cube, goes over it, down, and closes."""
    to_cube = state.cube - state.tcp
    # A cube looks the same every quarter turn, so the nearest side is never more than 45 degrees away.
    turn = (state.cube_yaw - state.finger_yaw + np.pi / 4) % (np.pi / 2) - np.pi / 4
    sideways = float(np.hypot(to_cube[0], to_cube[1]))
    if sideways < 0.01 and abs(to_cube[2]) < 0.008 and abs(turn) < 0.15:
        return _action(np.zeros(3), CLOSED)
    if sideways < 0.012 and abs(turn) < 0.15:
        return _action(to_cube, OPEN, turn=turn)
    over = to_cube + np.array([0.0, 0.0, 0.06])
    return _action(over, OPEN, turn=turn)


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
