"""Command-line options that the collector, the evaluator and the replay share."""

from __future__ import annotations

import argparse

from stoker_proto.arguments import positive
from trainer.sim.tasks.interface import Rendering


def add_processes(parser: argparse.ArgumentParser) -> None:
    """`--processes`."""
    parser.add_argument(
        "--processes",
        type=positive,
        default=2,
        metavar="N",
        help="simulators at a time, about 0.8 GB each (default %(default)s)",
    )


def add_env_modules(parser: argparse.ArgumentParser) -> None:
    """`--env-module`, repeatable."""
    parser.add_argument(
        "--env-module", action="append", default=[], metavar="M", help="Python module that registers environments"
    )


def add_rendering(parser: argparse.ArgumentParser) -> None:
    """`--image-size`, `--depth` and `--wrist-camera`, of which `rendering` makes a Rendering."""
    default = Rendering()
    parser.add_argument(
        "--image-size",
        type=positive,
        default=default.image_size,
        metavar="PIXELS",
        help="height and width of a picture (default %(default)s)",
    )
    parser.add_argument("--depth", action="store_true", help="depth pictures too, in millimetres (data.image.depth)")
    parser.add_argument(
        "--wrist-camera",
        action="store_true",
        help="a second camera on the hand, wrist_rgb in the data: three times the time; train with "
        "data.options.camera_keys [rgb, wrist_rgb]",
    )


def rendering(options: argparse.Namespace) -> Rendering:
    """What these options say."""
    return Rendering(image_size=options.image_size, depth=options.depth, wrist_camera=options.wrist_camera)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """`--quiet`."""
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
