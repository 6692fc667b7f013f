"""Makes ManiSkill demonstrations: `python -m trainer.sim.collect --task PushCube-v1 --num 20 --out DIR`."""

import argparse
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from stoker_proto.arguments import not_negative, positive, share
from stoker_proto.errors import ConfigError, StokerError
from trainer.sim.demonstration import Job, Reason, play
from trainer.sim.environment import TASKS, Environment
from trainer.sim.options import add_processes, add_quiet, add_rendering
from trainer.sim.policy_actor import load_act
from trainer.sim.recording import COMPRESSIONS, Recorder, Trajectory
from trainer.sim.workers import Interrupts, Workers

MAX_STEPS = 90
"""About twice what the longest expert (StackCube) takes."""

_HELP = f"""Makes demonstrations with ManiSkill: a scripted expert that knows the true state acts, a camera watches.

Written are DIR/NAME.jsonl, one line per trajectory (obs_path, task, instruction, actions, seed), and
DIR/NAME/traj_000000/obs.npz ... with rgb [T,H,W,3], state [T,9], qpos [T,9], tcp_pose [T,7], the camera's matrices, true
positions and, with --depth, depth [T,H,W] in mm; with --wrist-camera, wrist_rgb [T,H,W,3] (trainer/sim/recording.py).
Actions are the 7 numbers of pd_ee_delta_pose (translation, rotation, gripper) in [-1, 1].

Tasks: {", ".join(TASKS)}.
Trajectory i of a task starts from seed SEED+i; a failed or stuck one is counted, not written, and replaced by the seeds after it.
The same command writes the same bytes with any number of processes.
Ctrl-C keeps the trajectories that are complete, and nothing half-written.

Needs: pip install 'stoker[sim]', and a Vulkan renderer:
STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh (Debian 12, no GPU).
"""
_EXAMPLES = """examples:
  python -m trainer.sim.collect --task PushCube-v1 --num 20 --out demos
  python -m trainer.sim.collect --task PickCube-v1 --task StackCube-v1 --num 200 --depth --processes 8 --out demos
  python -m trainer.sim.collect --task PushCube-v1 --num 300 --image-size 256 --noise 0.75 --render-share 0.5 \\
      --settle 6 --paraphrases --format stored --out demos              (what trains a policy well: trainer/sim/README.md)
  python -m trainer.sim.collect --task PushCube-v1 --num 50 --image-size 256 --policy outputs/export --seed 600000 \\
      --name dagger --out demos                                         (the policy acts, the expert labels)
  python -m trainer.sim.collect --task PickCube-v1 --num 20 --seed 100000 --name val --out demos     (held-out seeds)
"""


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


_environments: dict[tuple[str, int, bool, bool], Environment] = {}
"""The one environment that this worker process holds open."""


def _work(job: Job) -> Trajectory | Reason:
    """In a worker process: plays one job in this process's environment, which is made when the task changes."""
    key = (job.task, job.image_size, job.depth, job.wrist_camera)
    if key not in _environments:
        while _environments:
            _environments.popitem()[1].close()
        _environments[key] = Environment(
            job.task, image_size=job.image_size, depth=job.depth, wrist_camera=job.wrist_camera
        )
    return play(_environments[key], job, None if job.policy is None else load_act(job.policy))


def _kept(workers: Workers, options: argparse.Namespace, task: str, dropped: Counter[Reason]) -> Iterator[Trajectory]:
    """The first `num` trajectories in the order of their seeds, however the workers finish. Adds to `dropped`."""
    max_dropped = options.num + 10

    def ask(seed: int) -> Future[Trajectory | Reason]:
        return workers.ask(_work, _job(options, task, seed))

    pending = deque(ask(options.seed + index) for index in range(options.num))
    next_seed = options.seed + options.num
    while pending:
        outcome = pending.popleft().result()
        if isinstance(outcome, Trajectory):
            yield outcome
            continue
        dropped[outcome] += 1
        if dropped.total() > max_dropped:
            raise ConfigError(
                f"{task}: {dropped.total()} episodes were thrown away ({_counts(dropped)}) for {options.num} demonstrations "
                "wanted: use a lower --noise"
            )
        pending.append(ask(next_seed))
        next_seed += 1


def _job(options: argparse.Namespace, task: str, seed: int) -> Job:
    return Job(
        task=task,
        seed=seed,
        image_size=options.image_size,
        depth=options.depth,
        wrist_camera=options.wrist_camera,
        noise=options.noise,
        render_share=options.render_share,
        settle=options.settle,
        max_steps=MAX_STEPS,
        paraphrases=options.paraphrases,
        policy=None if options.policy is None else str(options.policy),
    )


def _counts(dropped: Counter[Reason]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in sorted(dropped.items())) or "none thrown away"


def _collect(options: argparse.Namespace, recorder: Recorder, interrupts: Interrupts) -> None:
    total = options.num * len(options.task)
    bar = tqdm(total=total, unit="traj", disable=options.quiet)
    with bar, Workers(options.processes, interrupts) as workers:
        try:
            for task in options.task:
                bar.set_description(task)
                started, written, dropped = time.monotonic(), recorder.num_written, Counter[Reason]()
                for trajectory in _kept(workers, options, task, dropped):
                    recorder.write(trajectory)
                    bar.update()
                    rate = 60 * (recorder.num_written - written) / (time.monotonic() - started)
                    bar.set_postfix_str(f"{rate:.0f} a minute, {_counts(dropped)}")
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
    add("--num", type=positive, default=20, help="successful trajectories per task (default %(default)s)")
    add("--seed", type=int, default=0, help="seed of the first trajectory of each task (default %(default)s)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write to; made if missing")
    add("--name", default="train", help="name of the JSONL file and of its folder (default %(default)s)")
    add_rendering(parser)
    add_processes(parser)
    add("--format", choices=list(COMPRESSIONS), default="deflated", help="of the NPZ members (default %(default)s)")
    add("--noise", type=share, default=0.0, metavar="SHARE", help="share of episodes that are pushed off their path; labels "
        "stay the expert's (default %(default)s)")  # fmt: skip
    add("--render-share", type=share, default=1.0, metavar="SHARE", help="share of timesteps to render and record: rendering "
        "is nine tenths of the cost; below 1 for data.action.chunk 1 only (default %(default)s)")  # fmt: skip
    add("--settle", type=not_negative, default=0, metavar="N", help="timesteps to record after the success (default 0)")
    add("--paraphrases", action="store_true", help="say the instruction in several ways, in turns")
    add("--policy", type=Path, metavar="EXPORT", help="DAgger: this policy acts, the expert labels; failures are kept")
    add_quiet(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
