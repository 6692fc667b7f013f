"""Measures a policy in closed loop: `python -m trainer.sim.evaluate --model outputs/export --task PushCube-v1`."""

import argparse
import contextlib
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from stoker_proto.arguments import not_negative, positive
from stoker_proto.errors import ConfigError, StokerError
from stoker_proto.host.files import open_lock_file, try_lock
from stoker_proto.host.process import end_with_parent
from trainer.policy_options import add_policy_options
from trainer.sim.evaluation.episode import SETTLE_STEPS, EpisodeResult, Job, Protocol
from trainer.sim.evaluation.matching import Expectations, make_protocol
from trainer.sim.evaluation.pictures import Pictures, check_video, write_sheet
from trainer.sim.evaluation.results import Results, fingerprint_of_export, versions
from trainer.sim.evaluation.rollout import Rollout
from trainer.sim.evaluation.seeds import check_held_out, jobs_of, read_seeds
from trainer.sim.evaluation.simulators import Simulators
from trainer.sim.evaluation.summary import by_task, compare, comparison_table, table
from trainer.sim.evaluation.swapping import swap_table, swapped, with_swapped
from trainer.sim.options import add_env_modules, add_processes, add_quiet, add_rendering, rendering
from trainer.sim.tasks.registry import check_task, load_modules
from trainer.sim.workers import Interrupts

MODEL, OTHER = "model", "other"
"""Labels of `--model` and `--compare` in the JSON and in the names of videos."""

_HELP = f"""Measures an exported model in closed loop: it sees camera pictures and an instruction, a simulator executes actions.

Episode i of a task starts from seed START+i; take seeds that the training data do not have (--train-data checks it).
Success is counted twice: *once*, at any step, and *at the end*, {SETTLE_STEPS} steps after the first success or at the
limit. Intervals are Wilson's, 95%.
With --compare, two exports play the same seeds; the difference has Newcombe's 95% interval for pairs.

Written to --out: results.json, videos of the first successes and failures, contact_sheet.png.
The same command resumes where it stopped: finished episodes are kept, also with more --episodes or with --compare added.

The pictures must be those of the training data: pass --image-size, --depth, --wrist-camera, --image-history and --state as
they were there.
A simulator process that dies costs its episode, which is counted and played again by the next run.

Our tasks need: pip install 'stoker[sim]', and a Vulkan renderer:
STOKER_PYTHON=$(command -v python) sh trainer/sim/install_renderer.sh (Debian 12, no GPU).
Other tasks come from your own module: --env-module my_envs; see trainer/sim/README.md.
"""
_EXAMPLES = """examples:
  python -m trainer.sim.evaluate --model outputs/export --task PushCube-v1
  python -m trainer.sim.evaluate --model outputs/export --task PickCube-v1 --task StackCube-v1 --episodes 20 --processes 8
  python -m trainer.sim.evaluate --model outputs/new --compare outputs/old --task PushCube-v1 --out outputs/new_against_old
  python -m trainer.sim.evaluate --model outputs/export --task StackCube-v1 --swap       (does it follow the instruction?)
  python -m trainer.sim.evaluate --model outputs/export --env-module my_envs --task PutOnPlateInScene25Main-v3
"""


class SimulatorsKeepDyingError(StokerError):
    """More simulator processes died than --most-deaths allows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Player:
    """Plays the episodes of one model."""

    label: str
    rollout: Callable[[Simulators, Pictures], Rollout]
    protocol: Protocol


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the evaluation; returns the exit code (0 done, 1 failed, 130 interrupted)."""
    options = _parse(arguments)
    if options.end_with is not None and not end_with_parent(options.end_with, signal.SIGTERM):
        return 130  # the training that started it is over
    try:
        with Interrupts() as interrupts:
            _evaluate(options, interrupts)
    except KeyboardInterrupt:
        print(f"interrupted; the finished episodes are in {options.out}, and the same command resumes", file=sys.stderr)
        return 130
    except (StokerError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluate(options: argparse.Namespace, interrupts: Interrupts) -> None:
    """What can be found wrong without a simulator is checked first, cheap before slow."""
    load_modules(options.env_module)
    for task in options.task:
        check_task(task)
    if options.swap:
        options.task = with_swapped(options.task)
    check_video(options.videos > 0)
    if options.train_data:
        jobs = jobs_of(options.task, options.seed_start, options.episodes)
        if note := check_held_out(read_seeds(options.train_data), jobs):
            print(f"note: {note}", file=sys.stderr)
    folders = {MODEL: options.model} | ({OTHER: options.compare} if options.compare else {})
    players = [_player(label, folder, options) for label, folder in folders.items()]
    with _locked(options.out):
        results = _open_results(options, folders, players)
        jobs = jobs_of(options.task, options.seed_start, options.episodes)
        try:
            for player in players:
                _play(player, results, jobs, options, interrupts)
        finally:
            _conclude(results, [player.label for player in players], jobs, options)


def _player(label: str, folder: Path, options: argparse.Namespace) -> _Player:
    """Load a policy. torch and transformers are imported here, so that --help and wrong options answer at once."""
    import torch
    from transformers.utils import logging as transformers_logging

    from trainer.policy import Policy

    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    policy = Policy.load(folder, device=options.device)
    expected = Expectations.of(policy)
    protocol = make_protocol(
        expected,
        execute=options.execute,
        image_history=options.image_history,
        state=options.state,
        max_steps=options.max_steps,
    )

    def rollout(simulators: Simulators, pictures: Pictures) -> Rollout:
        return Rollout(policy, simulators, protocol, expected, pictures, batch=options.batch)

    return _Player(label=label, rollout=rollout, protocol=protocol)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two evaluations that write one folder would lose each other's episodes."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = open_lock_file(folder / ".lock")
    try:
        if not try_lock(descriptor):
            raise ConfigError(f"another evaluation writes to {folder}; choose another --out")
        yield
    finally:
        os.close(descriptor)


def _open_results(options: argparse.Namespace, folders: dict[str, Path], players: Sequence[_Player]) -> Results:
    setup = {
        "rendering": asdict(rendering(options)),
        "env_modules": options.env_module,
        "settle_steps": SETTLE_STEPS,
        "versions": versions(),
    }
    models = {}
    for player in players:
        folder = folders[player.label]
        identity = {"path": str(folder), "fingerprint": fingerprint_of_export(folder)}
        models[player.label] = {**identity, "protocol": asdict(player.protocol)}
    return Results(options.out, setup, models)


def _play(
    player: _Player, results: Results, jobs: list[Job], options: argparse.Namespace, interrupts: Interrupts
) -> None:
    """Play the episodes that the model has not finished yet. Raises SimulatorsKeepDyingError, ConfigError, PolicyError."""
    missing = results.missing(player.label, jobs)
    pictures = Pictures(options.out / "videos", player.label, options.videos)
    successes, num_deaths = Counter[bool](), 0
    bar = tqdm(
        total=len(jobs), initial=len(jobs) - len(missing), unit="episode", disable=options.quiet, desc=player.label
    )
    simulators = Simulators(
        min(options.processes, len(missing)),
        options.env_module,
        rendering(options),
        interrupts,
        deadline_s=options.deadline_s,
    )
    rollout = player.rollout(simulators, pictures)
    with bar, simulators:
        for outcome in rollout.play(missing):
            results.add_environments(rollout.facts)
            results.add(player.label, outcome)
            bar.update()
            if isinstance(outcome, EpisodeResult):
                successes[outcome.success_once] += 1
                bar.set_postfix_str(f"{outcome.task}, success {successes[True]} of {successes.total()}")
                continue
            num_deaths += 1
            if num_deaths > options.most_deaths:
                raise SimulatorsKeepDyingError(
                    f"{num_deaths} simulators died (--most-deaths {options.most_deaths}), the last one in {outcome.job.task} "
                    f"seed {outcome.job.seed}: {outcome.reason}; try fewer --processes, and check the renderer: "
                    "sh trainer/sim/install_renderer.sh --check"
                )


def _conclude(results: Results, labels: list[str], jobs: list[Job], options: argparse.Namespace) -> None:
    """Write and print what the episodes of these jobs say, however many there are."""
    wanted = {(job.task, job.seed) for job in jobs}
    finished = {label: [one for one in results.of(label) if (one.task, one.seed) in wanted] for label in labels}
    figures = {label: by_task(episodes) for label, episodes in finished.items()}
    results.conclude(summary=figures)
    for label in labels:
        folder = options.model if label == MODEL else options.compare
        print(f"\n{label}: {folder}, {len(finished[label])} of {len(jobs)} episodes")
        if finished[label]:
            print(table(figures[label]))
    of_labels = {label: rows for label in labels if (rows := swapped(finished[label], options.task))}
    if of_labels:
        results.conclude(swapped=of_labels)
    for label, rows in of_labels.items():
        print(f"\n{label}, with each instruction in the same scenes\n{swap_table(rows)}")
    if options.compare:
        rows = compare(finished[MODEL], finished[OTHER])
        results.conclude(comparison={"method": "Newcombe 1998, method 10: paired, 95%", "tasks": rows})
        if rows:
            print(
                f"\n{options.model} (first) against {options.compare} (second), difference with Newcombe's 95% interval"
            )
            print(comparison_table(rows))
    num_lost = len(results.missing(MODEL, jobs)) + (len(results.missing(OTHER, jobs)) if options.compare else 0)
    if num_lost:
        print(f"\n{num_lost} episodes have no result; the same command plays them")
    has_sheet = write_sheet(options.out / "videos", options.out / "contact_sheet.png")
    print(
        f"\n{results.path}" + (f", {options.out / 'contact_sheet.png'}, {options.out / 'videos'}" if has_sheet else "")
    )


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.sim.evaluate",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_what_is_played(parser)
    _add_how_it_is_played(parser)
    _add_how_it_runs(parser)
    options = parser.parse_args(arguments)
    options.task = list(dict.fromkeys(options.task))
    return options


def _add_what_is_played(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="EXPORT", help="folder that the trainer exported")
    add("--compare", type=Path, metavar="EXPORT", help="another one, to play the same seeds")
    add("--task", action="append", required=True, help="repeat for several")
    add("--swap", action="store_true", help="also play the same scenes with the other valid instruction, for tasks that have "
         "one, and show what was done under each")  # fmt: skip
    add_env_modules(parser)
    add("--episodes", type=positive, default=100, help="of each task (default %(default)s)")
    add("--seed-start", type=not_negative, default=1_000_000, help="seed of the first episode (default %(default)s)")
    add("--train-data", type=Path, action="append", default=[], metavar="JSONL", help="training data: a seed that they have "
        "is refused; repeat for several files")  # fmt: skip
    add("--out", type=Path, default=Path("outputs/evaluation"), metavar="DIR", help="default %(default)s")


def _add_how_it_is_played(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_rendering(parser)
    add(
        "--image-history",
        type=_history,
        default=(0,),
        metavar="=-4,0",
        help="data.options.image_history of the training",
    )
    add("--state", metavar="NAME", help="measurement that is the model's state, for data.state: text (say, qpos)")
    add_policy_options(parser, threads=1)
    add("--max-steps", type=positive, metavar="N", help="limit of an episode (default: the task's own)")


def _add_how_it_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_processes(parser)
    add("--batch", type=positive, default=1, help="most pictures that the model sees at once; above 1 it is faster on a GPU, "
        "and an episode may differ in the last bits (default %(default)s)")  # fmt: skip
    add(
        "--videos",
        type=not_negative,
        default=2,
        metavar="N",
        help="of successes, and of failures, of each task (default 2)",
    )
    add(
        "--most-deaths",
        type=not_negative,
        default=3,
        metavar="N",
        help="simulators that may die (default %(default)s)",
    )
    add("--deadline-s", type=positive, default=600, metavar="S", help="for a simulator's answer (default %(default)s)")
    add_quiet(parser)
    add("--end-with", type=int, help=argparse.SUPPRESS)  # the training that started it, by its process number


def _history(text: str) -> tuple[int, ...]:
    offsets = tuple(int(part) for part in text.split(","))
    if max(offsets) > 0 or list(offsets) != sorted(set(offsets)):
        raise argparse.ArgumentTypeError(f"{text}: timesteps up to 0 are expected, oldest first, such as -4,0")
    return offsets


if __name__ == "__main__":
    sys.exit(main())
