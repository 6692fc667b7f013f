"""The command `loader-convert`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loader_service.convert.episode import EpisodeSource
from loader_service.convert.maniskill import ManiSkill
from loader_service.convert.rl4vla import RL4VLA
from loader_service.convert.rlds import RLDS
from loader_service.convert.run import Output, convert
from stoker_proto.arguments import not_negative, positive
from stoker_proto.errors import ConfigError

_DESCRIPTION = """\
Turn recorded episodes into what `data.dataset_type: mani_openpi` reads: one JSON line per episode, its frames in an NPZ
beside it. Done once, before training; loaders read only the output. Nothing is resized and no action is changed.
(The loader can leave out timesteps without movement: data.action.drop_noops.)

formats:
  rl4vla      one pickled dict per file (.npz, .npy) with PIL images or JPEG, as RL4VLA and SimplerEnv collect them
  maniskill   trajectory.h5 with trajectory.json, recorded or replayed with obs_mode rgb
  rlds        TFRecord files with features.json, as Open X-Embodiment publishes them; TensorFlow is not needed"""

_EPILOG = """\
examples:
  loader-convert maniskill demos/PushCube-v1/trajectory.h5 --out pushcube --only-success
  loader-convert rlds bridge_orig/1.0.0 --out bridge --image-key steps/observation/image_0 --limit 100
  loader-convert rl4vla collected/ --out plates --task PutOnPlateInScene25Main-v3 --trust-pickle

Then name the JSONL in data.train_data_paths. After an interruption or an error, the same command resumes with the episodes that
are missing. Episodes whose file changed since (another size or time) are converted again, and the JSONL is rewritten. More or
fewer files are another conversion: use another folder. `loader-convert FORMAT --help` shows the options of a format.

exit codes: 0 all is written; 1 the data or the options are wrong; 2 the command line is wrong; 130 interrupted"""

_TRUST = """\
these files are Python pickles, and reading a pickle can run code that it contains. loader-convert accepts only numpy arrays and
images in them, but that is no guarantee. Pass --trust-pickle only for files that you made yourself or whose origin you trust"""

_SHOWN = 20
"""Bad episodes that are listed at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0. Raises StokerError, which the entry point prints (`loader_service.cli`)."""
    arguments = _parser().parse_args(argv)
    source = _source(arguments)
    _check_apart(arguments.inputs, arguments.out)
    output = Output(
        arguments.out,
        jsonl=arguments.name,
        limit=arguments.limit,
        compress=arguments.compress,
        skip_bad=arguments.skip_bad,
    )
    done = convert(source, output, jobs=arguments.jobs, progress=sys.stderr.isatty())
    print(
        f"{done.jsonl}: {done.num_episodes:,} episodes ({done.num_new:,} of them new), {done.num_actions:,} actions; every "
        "episode was read back and counted"
    )
    if done.bad:
        print(f"{len(done.bad):,} bad episodes were left out:")
        for reason in done.bad[:_SHOWN]:
            print(f"  {reason}")
        if len(done.bad) > _SHOWN:
            print(f"  ... and {len(done.bad) - _SHOWN:,} more")
    return 0


def _check_apart(inputs: Sequence[str], out: Path) -> None:
    """Raises ConfigError if the output lies in an input folder: it would be input of the next run."""
    for entry in inputs:
        folder = Path(entry).expanduser().resolve()
        if folder.is_dir() and out.expanduser().resolve().is_relative_to(folder):
            raise ConfigError(f"--out {out} lies in {entry}, whose files are read: name a folder elsewhere")


def _source(arguments: argparse.Namespace) -> EpisodeSource:
    inputs, task = tuple(arguments.inputs), arguments.task
    if arguments.format == "rl4vla":
        if not arguments.trust_pickle:
            raise ConfigError(_TRUST.replace("\n", " "))
        return RL4VLA(inputs=inputs, task=task, encoded_rgb=arguments.encoded_rgb)
    if arguments.format == "maniskill":
        return ManiSkill(
            inputs=inputs,
            task=task,
            cameras=arguments.camera,
            control_mode=arguments.control_mode,
            only_success=arguments.only_success,
            depth=arguments.depth,
            qvel=arguments.qvel,
        )
    return RLDS(
        inputs=inputs,
        task=task,
        split=arguments.split,
        image_keys=arguments.image_key,
        action_keys=tuple(arguments.action_key.split(",")),
        instruction_key=arguments.instruction_key or None,
        state_keys=tuple(arguments.state_key.split(",")) if arguments.state_key else (),
    )


def _parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("loader-convert", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=shape)
    formats = parser.add_subparsers(dest="format", required=True, metavar="FORMAT", title="format")
    common = _options_of_all()
    _add_rl4vla(
        formats.add_parser(
            "rl4vla",
            parents=[common],
            help="pickled dicts (needs --trust-pickle)",
            formatter_class=shape,
            description=_TRUST,
        )
    )
    _add_maniskill(formats.add_parser("maniskill", parents=[common], help="HDF5 and JSON", formatter_class=shape))
    _add_rlds(formats.add_parser("rlds", parents=[common], help="TFRecord files", formatter_class=shape))
    return parser


def _options_of_all() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files, folders or globs (rlds: folders)")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="output folder, made if missing; use one per conversion",
    )
    add(
        "--name",
        type=_name,
        default="train.jsonl",
        metavar="FILE",
        help="name of the JSONL file in it (default: %(default)s)",
    )
    add("--task", metavar="ID", help="task id of all rows; needed where episodes have no instruction")
    add("--jobs", type=not_negative, default=0, metavar="N", help="processes (default: one per core)")
    add("--limit", type=positive, metavar="N", help="only the first N episodes")
    add(
        "--compress",
        action="store_true",
        help="deflate the NPZ files: smaller, and about 1.6 times the loader's CPU per sample",
    )
    add(
        "--skip-bad",
        action="store_true",
        help="leave out bad episodes, and name them (default: stop at the first); the rest of a damaged file counts as one",
    )
    return common


def _add_rl4vla(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--trust-pickle", action="store_true", help="read pickles: you trust the origin of these files")
    add(
        "--encoded-rgb",
        action="store_true",
        help="JPEG images are RGB (by default red and blue are swapped back: RL4VLA's collector swaps them)",
    )


def _add_maniskill(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--camera",
        type=_keys,
        default=(),
        metavar="NAME[,NAME...]",
        help="cameras, where there are several; the first is written as `rgb`, others as `rgb_NAME` (data.options.camera_keys)",
    )
    add("--control-mode", metavar="MODE", help="leave out episodes of another mode; needed where there are several")
    add("--only-success", action="store_true", help="leave out episodes that did not succeed")
    add("--depth", action="store_true", help="write depth frames too (data.image.depth)")
    add("--qvel", action="store_true", help="states are qpos and qvel (default: qpos, where it was recorded)")


def _add_rlds(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--split", default="train", metavar="NAME", help="split to read (default: %(default)s)")
    add(
        "--image-key",
        type=_keys,
        default="steps/observation/image",
        metavar="KEY[,KEY...]",
        help="default: %(default)s; the first is written as `rgb`, others as `rgb_LAST` (LAST: last part of the key)",
    )
    add(
        "--action-key",
        default="steps/action",
        metavar="KEY[,KEY...]",
        help="default: %(default)s; several are put side by side, e.g. steps/action/world_vector,steps/action/rotation_delta",
    )
    add(
        "--instruction-key",
        default="steps/language_instruction",
        metavar="KEY",
        help='default: %(default)s; "" where there is none, with --task',
    )
    add("--state-key", metavar="KEY[,KEY...]", help="write states too (data.state), e.g. steps/observation/state")


def _keys(text: str) -> tuple[str, ...]:
    keys = tuple(text.split(","))
    if not all(keys) or len(set(keys)) < len(keys):
        raise argparse.ArgumentTypeError(f"{text!r}: names with commas between them, each once")
    return keys


def _name(text: str) -> str:
    if Path(text).name != text or not text.endswith(".jsonl") or text.startswith("."):
        raise argparse.ArgumentTypeError(f"{text!r}: the name of a .jsonl file, without a folder")
    return text
