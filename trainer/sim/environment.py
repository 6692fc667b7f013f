"""One ManiSkill table-top task as a small object: reset(seed), step(action), observation, true state.

The collector records it and closed-loop evaluation drives it, so both see the same camera, controller and instruction.
Letters: H, W = image height and width in pixels. Lengths are metres, angles radians, quaternions (w, x, y, z).
World frame: the robot stands at x = -0.615 and looks along +x ("forward"); +y is its left; the table top is z = 0.

An action is 7 numbers in [-1, 1] (`pd_ee_delta_pose`): the translation of the hand in units of 0.1 m in the world
frame, its rotation in units of -0.1 rad (mind the sign: ManiSkill multiplies by the *lower* bound), then the gripper
(+1 open, -1 closed). Measured: a step turns and moves the hand by about 0.4 of what is asked (the drives lag behind).
"""

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from stoker_proto.errors import StokerError
from trainer.sim.recording import WRIST_ROBOT

FloatArray = npt.NDArray[np.float64]

ACTION_WIDTH = 7
CONTROL_MODE = "pd_ee_delta_pose"


class SimulatorUnavailableError(StokerError):
    """ManiSkill is not installed, or it found no device to render with. The message says what to install."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Camera:
    """The position of the camera; closer and narrower than ManiSkill's own, whose 90 degrees leave a cube 5 pixels."""

    eye: tuple[float, float, float]
    """Position of the camera, metres in the world frame."""
    target: tuple[float, float, float]
    """The point in the middle of the picture, metres in the world frame."""
    fov_degrees: float
    """Vertical (= horizontal, the image is square) field of view, degrees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What differs between the tasks, by ManiSkill's environment id."""

    actors: Mapping[str, str]
    """Our name -> attribute of the ManiSkill environment, for objects whose poses the expert may use."""
    instruction: str
    """The instruction for the policy; `{goal}` stands for the goal position in whole centimetres."""
    paraphrases: tuple[str, ...]
    """Other ways to say it."""
    camera: Camera
    module: str | None = None
    """Module of ours that defines the ManiSkill environment; None: ManiSkill has it."""
    colours: tuple[str, str] | None = None
    """Colours of cube and goal, where either may be stacked on the other and the instruction says which."""


TASKS: dict[str, Task] = {
    "PushCube-v1": Task(
        actors={"cube": "obj", "goal": "goal_region"},
        instruction="push the blue cube forward onto the red and white target",
        paraphrases=(
            "push the cube to the target",
            "shove the block forward to the goal",
            "move the cube away from you onto the target",
        ),
        camera=Camera(eye=(0.60, 0.0, 0.55), target=(0.08, 0.0, 0.02), fov_degrees=44),
    ),
    "PickCube-v1": Task(
        actors={"cube": "cube", "goal": "goal_site"},
        instruction="pick up the red cube and hold it at {goal}",
        paraphrases=(
            "grasp the red cube and lift it to {goal}",
            "pick the block up and hold it at {goal}",
            "lift the cube to {goal}",
        ),
        camera=Camera(eye=(0.62, 0.0, 0.50), target=(0.0, 0.0, 0.14), fov_degrees=42),
    ),
    "PullCube-v1": Task(
        actors={"cube": "obj", "goal": "goal_region"},
        instruction="pull the blue cube back onto the red and white target",
        paraphrases=(
            "pull the cube to the target",
            "drag the block back to the goal",
            "move the cube towards you onto the target",
        ),
        # From the side: seen from the front, the hand hides the cube that it pulls.
        camera=Camera(eye=(0.15, -0.58, 0.45), target=(-0.10, 0.0, 0.04), fov_degrees=44),
    ),
    "StackCube-v1": Task(
        actors={"cube": "cubeA", "goal": "cubeB"},
        instruction="stack the red cube on the green cube",
        paraphrases=(
            "put the red cube on top of the green cube",
            "place the red block on the green block",
            "pick up the red cube and stack it on the green one",
        ),
        camera=Camera(eye=(0.58, 0.0, 0.50), target=(0.0, 0.0, 0.04), fov_degrees=50),
        colours=("red", "green"),
    ),
    "StackGreenOnRed-v1": Task(
        actors={"cube": "cubeA", "goal": "cubeB"},
        instruction="stack the green cube on the red cube",
        paraphrases=(
            "put the green cube on top of the red cube",
            "place the green block on the red block",
            "pick up the green cube and stack it on the red one",
        ),
        camera=Camera(eye=(0.58, 0.0, 0.50), target=(0.0, 0.0, 0.04), fov_degrees=50),
        module="trainer.sim.stacking",
        colours=("green", "red"),
    ),
}
"""The tasks we have an expert for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One observation: what a real robot could measure at one timestep."""

    rgb: npt.NDArray[np.uint8]
    """uint8[H, W, 3]"""
    depth: npt.NDArray[np.uint16] | None
    """uint16[H, W], millimetres from the camera's plane; None without `depth`."""
    wrist_rgb: npt.NDArray[np.uint8] | None = None
    """uint8[H, W, 3] of the camera on the hand; None without `wrist_camera`."""
    qpos: npt.NDArray[np.float32]
    """float32[9]: 7 joint angles (radians), 2 finger positions (metres)."""
    tcp_pose: npt.NDArray[np.float32]
    """float32[7]: position and quaternion of the tool centre point, between the finger tips."""
    state: npt.NDArray[np.float32]
    """float32[9], the state for `data.state: text`: half of the fingers' gap (m), tool centre point (m), sine and cosine of the
    direction in which the fingers close, and the goal as the instruction says it (m; zeros where it says none)."""
    intrinsic_cv: npt.NDArray[np.float32]
    """float32[3, 3]: camera -> pixels, in OpenCV's convention."""
    extrinsic_cv: npt.NDArray[np.float32]
    """float32[3, 4]: world -> camera."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivilegedState:
    """The true state, known only to the simulator; the scripted experts use nothing else (no memory, no clock)."""

    tcp: FloatArray
    """float64[3]: the tool centre point."""
    finger_yaw: float
    """Direction in which the fingers close, about the vertical."""
    cube: FloatArray
    """float64[3]: centre of the cube to be moved."""
    cube_yaw: float
    goal: FloatArray
    """float64[3]: centre of the target disc (Push, Pull), of the cube to stack on (Stack), or the goal as the
    instruction says it, so rounded to whole centimetres (Pick)."""
    is_grasped: bool
    """Both fingers press on the cube."""

    def objects(self) -> npt.NDArray[np.float32]:
        """float32[8] that training may predict beside the actions: positions of the cube to be moved and of the goal (m), then
        the cube's direction as a point on a circle of 0.1 m. A quarter turn goes once around the circle, because a cube then
        looks the same.

        Where the instruction says which of two cubes is to be moved, only a policy that reads it can predict these."""
        turn = 4 * self.cube_yaw
        return np.array([*self.cube, *self.goal, 0.1 * np.sin(turn), 0.1 * np.cos(turn)], np.float32)


class Environment:
    """One ManiSkill environment on the CPU, one robot (`panda`), one or two cameras. Use one per process."""

    def __init__(self, task: str, *, image_size: int = 128, depth: bool = False, wrist_camera: bool = False) -> None:
        """Builds the scene (about 8 CPU seconds). `task` is a key of `TASKS`; images are image_size x image_size.

        wrist_camera: the robot is `panda_wristcam`, which carries a second camera on its hand; a step then takes three times as
        long.
        """
        self.task = task
        self._spec = TASKS[task]
        self._depth, self._wrist_camera = depth, wrist_camera
        self._made = _make(self._spec, task, image_size, depth, wrist_camera)
        self._raw = self._made.unwrapped
        self._render = self._raw.get_obs
        # Rendering takes nine tenths of a step. ManiSkill renders in each step; here only `observe` does.
        self._raw.get_obs = lambda *arguments, **named: {}
        self.reward = 0.0
        """ManiSkill's own reward of the latest step (dense, at most 1)."""

    def reset(self, seed: int) -> Observation:
        """Starts the episode of `seed`.

        The scene is rebuilt (0.25 s): only then is an episode bitwise independent of earlier episodes in this process.
        """
        self.begin(seed)
        return self.observe()

    def begin(self, seed: int) -> None:
        """`reset` without rendering."""
        self._made.reset(seed=seed, options={"reconfigure": True})

    def step(self, action: npt.ArrayLike) -> tuple[Observation, bool]:
        """Executes one action (7 floats, see the module) for 1/20 s; returns the observation after it, and success."""
        success = self.advance(action)
        return self.observe(), success

    def advance(self, action: npt.ArrayLike) -> bool:
        """`step` without rendering: a tenth of its time."""
        _, reward, _, _, info = self._made.step(np.asarray(action, dtype=np.float32))
        self.reward = float(reward)
        return bool(info["success"].item())

    def instruction(self, number: int = 0) -> str:
        """The instruction of this episode. number: which way to say it (modulo how many there are); 0 is the usual one.

        PickCube's goal is invisible to the camera, so the instruction names it, in whole centimetres: the rounding error
        is at most 0.9 cm, the task's own tolerance 2.5 cm.
        """
        wordings = (self._spec.instruction, *self._spec.paraphrases)
        wording = wordings[number % len(wordings)]
        if "{goal}" not in wording:
            return wording
        x_cm, y_cm, z_cm = (round(100 * value) for value in self._position("goal"))
        sideways = f"{abs(y_cm)} cm {'left' if y_cm >= 0 else 'right'}"
        along = f"{abs(x_cm)} cm {'forward' if x_cm >= 0 else 'back'}"
        return wording.format(goal=f"{along}, {sideways}, {z_cm} cm up")

    def state(self) -> PrivilegedState:
        """The privileged state at this moment."""
        told = self._goal_told()
        goal = self._position("goal") if told is None else told
        cube = self._actor("cube")
        tcp = self._raw.agent.tcp.pose
        return PrivilegedState(
            tcp=_numpy(tcp.p),
            finger_yaw=_axis_yaw(tcp, 1),
            cube=_numpy(cube.pose.p),
            cube_yaw=_axis_yaw(cube.pose, 0),
            goal=goal,
            is_grasped=bool(self._raw.agent.is_grasping(cube).item()),
        )

    def outcome(self) -> str:
        """Which cube lies on which at this moment and is let go, as "red on green", whatever the instruction is; empty: none, or
        the scene has one valid instruction only."""
        if self._spec.colours is None:
            return ""
        offset = self._position("cube") - self._position("goal")
        is_aligned = np.hypot(offset[0], offset[1]) <= np.hypot(0.02, 0.02) + 0.005  # ManiSkill's own bounds
        is_stacked = bool(is_aligned and abs(abs(offset[2]) - 0.04) <= 0.005)
        upper, lower = ("cube", "goal") if offset[2] > 0 else ("goal", "cube")
        if not is_stacked or self._raw.agent.is_grasping(self._actor(upper)).item():
            return ""
        names = dict(zip(("cube", "goal"), self._spec.colours, strict=True))
        return f"{names[upper]} on {names[lower]}"

    def close(self) -> None:
        """Frees the scene and the renderer."""
        self._made.close()

    def _actor(self, name: str) -> Any:
        return getattr(self._raw, self._spec.actors[name])

    def _position(self, name: str) -> FloatArray:
        return _numpy(self._actor(name).pose.p)

    def _goal_told(self) -> FloatArray | None:
        """The goal as the instruction says it, in whole centimetres; None where it says none."""
        return np.round(self._position("goal"), 2) if "{goal}" in self._spec.instruction else None

    def observe(self) -> Observation:
        """Renders what the robot measures now."""
        seen = self._render()
        images, matrices = seen["sensor_data"]["base_camera"], seen["sensor_param"]["base_camera"]
        wrist = seen["sensor_data"]["hand_camera"]["rgb"][0] if self._wrist_camera else None
        qpos = seen["agent"]["qpos"][0].cpu().numpy().astype(np.float32)
        tcp, told = self._raw.agent.tcp.pose, self._goal_told()
        yaw = _axis_yaw(tcp, 1)
        goal = np.zeros(3) if told is None else told
        return Observation(
            rgb=images["rgb"][0].cpu().numpy().astype(np.uint8),
            # ManiSkill gives int16 millimetres; no table-top point is farther than 32 m, so the cast loses nothing.
            depth=images["depth"][0, :, :, 0].cpu().numpy().astype(np.uint16) if self._depth else None,
            wrist_rgb=None if wrist is None else wrist.cpu().numpy().astype(np.uint8),
            qpos=qpos,
            tcp_pose=tcp.raw_pose[0].cpu().numpy().astype(np.float32),
            state=np.array([qpos[7:].mean(), *_numpy(tcp.p), np.sin(yaw), np.cos(yaw), *goal], np.float32),
            intrinsic_cv=matrices["intrinsic_cv"][0].cpu().numpy().astype(np.float32),
            extrinsic_cv=matrices["extrinsic_cv"][0].cpu().numpy().astype(np.float32),
        )


def _make(spec: Task, task: str, image_size: int, depth: bool, wrist_camera: bool) -> Any:
    try:
        gymnasium = importlib.import_module("gymnasium")
        importlib.import_module(spec.module or "mani_skill.envs")
        look_at = importlib.import_module("mani_skill.utils.sapien_utils").look_at
    except ImportError as error:
        raise SimulatorUnavailableError(
            f"the simulator needs ManiSkill ({error}); install it with: pip install 'stoker[sim]', "
            "then the renderer with: STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh"
        ) from error
    # It warns at every reset about its own environments' missing initial poses, and that not all of its tasks name the robot with
    # a camera on its wrist (they place its joints nevertheless): nothing that a user could mend.
    # The space at the end of the logger's name is ManiSkill's.
    logging.getLogger("mani_skill ").setLevel(logging.ERROR)
    camera = spec.camera
    size = {"width": image_size, "height": image_size}
    fov = float(np.deg2rad(camera.fov_degrees))
    cameras = {"base_camera": {"pose": look_at(camera.eye, camera.target), "fov": fov, **size}}
    if wrist_camera:
        cameras["hand_camera"] = size
    try:
        return gymnasium.make(
            task,
            obs_mode="rgb+depth" if depth else "rgb",
            control_mode=CONTROL_MODE,
            # StackCube's default carries a camera on its wrist: other pictures, three times the time.
            robot_uids=WRIST_ROBOT if wrist_camera else "panda",
            sim_backend="physx_cpu",
            render_backend="sapien_cpu",
            sensor_configs=cameras,
        )
    except RuntimeError as error:
        raise SimulatorUnavailableError(
            f"ManiSkill cannot draw on this machine ({str(error).strip()}); install the software renderer with: "
            "STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh "
            "(and 'stoker[sim]' if ManiSkill itself is broken)"
        ) from error


def _numpy(batched: Any) -> FloatArray:
    return np.asarray(batched[0].cpu().numpy(), dtype=np.float64)


def _axis_yaw(pose: Any, axis: int) -> float:
    """Direction of one of a pose's own axes, seen from above: radians from +x towards +y."""
    x, y = _numpy(pose.to_transformation_matrix())[:2, axis]
    return float(np.arctan2(y, x))
