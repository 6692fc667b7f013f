"""Makes ManiSkill demonstrations: `python -m trainer.sim.collect --task PushCube-v1 --num 20 --out DIR`."""

import argparse
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from stoker_proto.errors import ConfigError, StokerError
from trainer.sim.environment import TASKS, Environment, Observation
from trainer.sim.experts import EXPERTS
from trainer.sim.recording import COMPRESSIONS, Recorder, Trajectory
from trainer.sim.workers import Interrupts, Workers

MAX_STEPS = 80  # about twice what the longest expert (StackCube) takes
_HELD_AT_THE_END = {"PickCube-v1"}
"""Its goal may lie where the cube lies: ManiSkill then calls it solved, but untouched it shows no picking."""

_HELP = f"""Makes demonstrations with ManiSkill: a scripted expert that knows the true state acts, a camera watches.

Written are DIR/NAME.jsonl, one line per trajectory (obs_path, task, instruction, actions, seed), and
DIR/NAME/traj_000000/obs.npz ... with rgb [T,H,W,3], qpos [T,9], tcp_pose [T,7] and, with --depth, depth [T,H,W] in mm.
Actions are the 7 numbers of pd_ee_delta_pose (translation, rotation, gripper) in [-1, 1].

Tasks: {", ".join(TASKS)}.
Trajectory i of a task starts from seed SEED+i; a failed one is not written, the seeds after it take its place.
The same command writes the same bytes with any number of processes.
Ctrl-C keeps the trajectories that are complete, and nothing half-written.

Needs: pip install 'stoker[sim]', and a Vulkan renderer:
STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh (Debian 12, no GPU).
"""
_EXAMPLES = """examples:
  python -m trainer.sim.collect --task PushCube-v1 --num 20 --out demos
  python -m trainer.sim.collect --task PickCube-v1 --task StackCube-v1 --num 200 --depth --processes 8 --out demos
  python -m trainer.sim.collect --task PickCube-v1 --num 20 --seed 100000 --name val --out demos     (held-out seeds)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One episode to be played."""

    task: str
    seed: int
    image_size: int
    depth: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the collector; returns the exit code (0 done, 1 failed, 130 interrupted)."""
    options = _parse(arguments)
    try:
        recorder = Recorder(options.out, options.name, options.format)
        try:
            with Interrupts() as interrupts, recorder:
                _collect(options, recorder, interrupts)
        except KeyboardInterrupt:
            print(f"interrupted; {_summary(recorder)}", file=sys.stderr)
            return 130
    except (StokerError, OSError) as error:
        print(f"collect: {error}", file=sys.stderr)
        return 1
    print(_summary(recorder))
    return 0


def play(environment: Environment, job: Job) -> Trajectory | None:
    """Plays the expert from the job's seed; None if it has not succeeded after MAX_STEPS."""
    expert = EXPERTS[job.task]
    seen = [environment.reset(job.seed)]
    instruction = environment.instruction()
    actions = []
    for _ in range(MAX_STEPS):
        actions.append(expert(environment.state()))
        observation, success = environment.step(actions[-1])
        if success and (job.task not in _HELD_AT_THE_END or environment.state().is_grasped):
            return Trajectory(
                task=job.task,
                instruction=instruction,
                seed=job.seed,
                actions=np.stack(actions),
                observations=_stack(seen),
            )
        seen.append(observation)
    return None


def _stack(seen: Sequence[Observation]) -> dict[str, npt.NDArray[Any]]:
    members = {"rgb": np.stack([one.rgb for one in seen])}
    depth = [one.depth for one in seen if one.depth is not None]
    if depth:
        members["depth"] = np.stack(depth)
    members["qpos"] = np.stack([one.qpos for one in seen])
    members["tcp_pose"] = np.stack([one.tcp_pose for one in seen])
    return members


_environments: dict[tuple[str, int, bool], Environment] = {}
"""The one environment that this worker process holds open."""


def _work(job: Job) -> Trajectory | None:
    """In a worker process: plays one job in this process's environment, which is made when the task changes."""
    key = (job.task, job.image_size, job.depth)
    if key not in _environments:
        while _environments:
            _environments.popitem()[1].close()
        _environments[key] = Environment(job.task, image_size=job.image_size, depth=job.depth)
    return play(_environments[key], job)


def _successes(workers: Workers, options: argparse.Namespace, task: str) -> Iterator[Trajectory]:
    """The first `num` successful trajectories in the order of their seeds, however the workers finish."""
    max_failures = options.num + 10
    num_failures = 0

    def ask(seed: int) -> Future[Trajectory | None]:
        return workers.ask(_work, Job(task=task, seed=seed, image_size=options.image_size, depth=options.depth))

    pending = deque(ask(options.seed + index) for index in range(options.num))
    next_seed = options.seed + options.num
    while pending:
        trajectory = pending.popleft().result()
        if trajectory is not None:
            yield trajectory
            continue
        num_failures += 1
        if num_failures > max_failures:
            raise ConfigError(f"{task}: the expert failed {num_failures} times for {options.num} demonstrations wanted")
        pending.append(ask(next_seed))
        next_seed += 1


def _collect(options: argparse.Namespace, recorder: Recorder, interrupts: Interrupts) -> None:
    total = options.num * len(options.task)
    bar = tqdm(total=total, unit="traj", disable=options.quiet)
    with bar, Workers(options.processes, interrupts) as workers:
        try:
            for task in options.task:
                bar.set_description(task)
                for trajectory in _successes(workers, options, task):
                    recorder.write(trajectory)
                    bar.update()
        except BrokenProcessPool as error:
            raise ConfigError(
                "a worker process died (out of memory, or a crash in the renderer); try fewer --processes, "
                "and check the renderer: sh trainer/sim/install_renderer.sh --check"
            ) from error


def _summary(recorder: Recorder) -> str:
    if recorder.num_written == 0:
        return "no trajectory was written"
    return f"{recorder.num_written} complete trajectories in {recorder.jsonl}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.sim.collect",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--task", action="append", choices=list(TASKS), required=True, help="repeat for several, written in this order")
    add("--num", type=_positive, default=20, help="successful trajectories per task (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the first trajectory of each task (default %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to; made if missing")
    add("--name", default="train", help="name of the JSONL file and of its folder (default %(default)s)")
    add("--image-size", type=_positive, default=128, metavar="PIXELS", help="images are square (default %(default)s)")
    add("--depth", action="store_true", help="record depth images too, in millimetres")
    add("--processes", type=_positive, default=2, help="simulators at a time, about 0.8 GB each (default %(default)s)")
    add("--format", choices=list(COMPRESSIONS), default="deflated", help="of the NPZ members (default %(default)s)")
    add("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
