"""`python -m trainer.sim.replay`: the gates before a training, from the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stoker_proto.arguments import positive, positive_share
from stoker_proto.config.reader import load_config
from stoker_proto.errors import ConfigError, StokerError
from stoker_proto.processor import FILE, Processor
from trainer.sim.evaluation.simulators import Simulators
from trainer.sim.options import add_env_modules, add_processes
from trainer.sim.replay.gates import GateResult, run_gates
from trainer.sim.replay.plays import Player
from trainer.sim.replay.recordings import Recording, read_recordings
from trainer.sim.tasks.interface import Rendering
from trainer.sim.tasks.registry import check_task, is_known, load_modules
from trainer.sim.workers import Interrupts

_HELP = """Gates before a training: can these demonstrations teach this task at all?

  replay       recorded actions are played open loop from their seeds. They succeeded when they were recorded.
  round trip   the same actions are encoded to tokens, decoded by the code that the policy uses, and played.

A training cannot be better than its gates. A failed gate plays variations of the actions and says which dimension, unit or
gripper convention makes the difference; the exit code is then 1. No model is needed, and no loader.

Rows need `task` and `seed`, as `python -m trainer.sim.collect` writes them; `executed_actions` are replayed where a row has them.
The round trip needs --processor: an export, a checkpoint, or a checkpoint's processor folder, of a run on the same data.
`deepspeed trainer/main.py --config my.yaml --check` runs both gates with the processor that the loaders send.
"""
_EXAMPLES = """examples:
  python -m trainer.sim.replay --data demos/train.jsonl
  python -m trainer.sim.replay --config my.yaml --processor outputs/export
  python -m trainer.sim.replay --data demos.jsonl --env-module my_envs --task PutOnPlateInScene25Main-v3 --episodes 10
"""
SMALL = 16
"""Pixels: nobody looks at the pictures."""
DEADLINE_S = 600.0
MOST_DEATHS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """What the gates play, and what passes."""

    episodes: int = 5
    """Of each task: the first ones of the files."""
    tasks: tuple[str, ...] = ()
    """Only these; empty: all in the files."""
    skip_unknown: bool = False
    """Leave out tasks without an environment, such as those of real robots, with a note, instead of raising an error."""
    env_modules: tuple[str, ...] = ()
    """Python modules that register environments."""
    processes: int = 1
    """Simulators at a time."""
    least: float = 0.8
    """Share of the episodes that must succeed, in (0, 1]."""


_DEFAULTS = ReplayOptions()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the gates; returns the exit code: 0 passed, 1 failed or one line on stderr, 130 interrupted."""
    options = _parse(arguments)
    try:
        with Interrupts() as interrupts:
            passed = check_demonstrations(
                options.data + _of_config(options.config),
                _processor(options.processor),
                interrupts,
                ReplayOptions(
                    episodes=options.episodes,
                    tasks=tuple(options.task),
                    env_modules=tuple(options.env_module),
                    processes=options.processes,
                    least=options.least,
                ),
            )
    except KeyboardInterrupt:
        return 130
    except (StokerError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 1
    return 0 if passed else 1


def check_demonstrations(
    files: Sequence[Path], processor: Processor | None, interrupts: Interrupts, options: ReplayOptions
) -> bool:
    """Whether the gates pass; prints a line for each. Raises ConfigError, DataError, SimulatorsDiedError."""
    if not files:
        raise ConfigError("no demonstrations: name JSONL files with --data, or a config with --config")
    load_modules(options.env_modules)
    recordings = read_recordings(files, options.episodes, options.tasks)
    if recordings.num_without:
        print(f"note: {recordings.num_without} rows have no task or no seed, and cannot be replayed")
    if not recordings.episodes:
        raise ConfigError(
            f"nothing to replay in {', '.join(map(str, files))}: no row has a task and a seed"
            + (f" of {', '.join(options.tasks)}" if options.tasks else "")
            + "; `python -m trainer.sim.collect` writes both"
        )
    played = [one for one in recordings.episodes if not options.skip_unknown or is_known(one.task)]
    for task in sorted({one.task for one in recordings.episodes}):
        if not options.skip_unknown:
            check_task(task)
        elif not is_known(task):
            print(f"note: {task} is no environment that is known here, so it is not checked")
    if processor is None:
        print("note: without --processor the round trip is not checked")

    def report(result: GateResult) -> None:
        print("\n".join(result.lines()), flush=True)

    number = min(options.processes, len(played))
    rendering = Rendering(image_size=SMALL, wrist_camera=_wrist_camera(played))
    with Simulators(number, options.env_modules, rendering, interrupts, deadline_s=DEADLINE_S) as simulators:
        return run_gates(played, processor, Player(simulators, MOST_DEATHS), options.least, report)


def _wrist_camera(played: Sequence[Recording]) -> bool:
    """Whether the robot carries a camera on its hand in all of them. Raises ConfigError for some."""
    kinds = {one.wrist_camera: one.place for one in played}
    if len(kinds) > 1:
        raise ConfigError(
            f"{kinds[True]} was recorded with --wrist-camera and {kinds[False]} without: these are different robots; check them "
            "one after the other, with --data"
        )
    return True in kinds


def _of_config(file: Path | None) -> list[Path]:
    """The JSONL files among the training data of a config. Raises ConfigError."""
    if file is None:
        return []
    return jsonl_files(load_config(file).data.paths("train"))


def jsonl_files(paths: Sequence[str]) -> list[Path]:
    """Those that are JSONL files on this machine."""
    return [path for path in map(Path, paths) if path.suffix == ".jsonl" and path.is_file()]


def _processor(folder: Path | None) -> Processor | None:
    if folder is None:
        return None
    inside = folder / "processor"  # of a checkpoint
    return Processor.load(inside if (inside / FILE).is_file() else folder)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.sim.replay",
        description=_HELP,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        action="append",
        default=[],
        metavar="JSONL",
        help="demonstrations; repeat for several files",
    )
    add("--config", type=Path, metavar="YAML", help="its training data")
    add("--processor", type=Path, metavar="DIR", help="an export, or a checkpoint, for the round trip")
    add("--task", action="append", default=[], help="only these; repeat for several (default: all in the data)")
    add_env_modules(parser)
    add("--episodes", type=positive, default=_DEFAULTS.episodes, metavar="N", help="of each task (default %(default)s)")
    add_processes(parser)
    add(
        "--least",
        type=positive_share,
        default=_DEFAULTS.least,
        metavar="SHARE",
        help="of the episodes that must succeed (default %(default)s)",
    )
    return parser.parse_args(arguments)
