"""One node: a loader per `dataloader` slot, and DeepSpeed on exactly the `trainer` slots. No process outlives the launcher.

    python deploy/launch.py --config deploy/configs/demo.yaml --set trainer.epochs=1
    stoker-launch --config my.yaml                          # the same, where the package is installed

The exit code is the trainer's, and 0 only if the trainer wrote summary.json in its output_dir. A loader that dies is restarted.
Ctrl-C and SIGTERM go to the trainer, then the loaders drain; a second one kills.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = (str(ROOT), str(ROOT / "proto")) if (ROOT / "proto").is_dir() else ()  # none where a wheel is installed
if __name__ == "__main__":  # `python deploy/launch.py` puts deploy/ first on the path; the source roots belong there
    sys.path[0:1] = SOURCE_ROOTS

from deploy.child import say  # noqa: E402  (the path must stand before)
from deploy.keeper import run_kept  # noqa: E402
from deploy.loaders import LoaderPlan  # noqa: E402
from deploy.node import Plan, run_node  # noqa: E402
from stoker_proto.config import Config  # noqa: E402
from stoker_proto.config.reader import add_config_arguments, load_config  # noqa: E402
from stoker_proto.errors import ConfigError  # noqa: E402

_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these exists where torch can find a CUDA or ROCm device; asking torch itself costs seconds."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    if options.plan:
        return subprocess.run(plan_command(options), check=False).returncode
    try:
        plan = make_plan(options, os.environ)
    except ConfigError as error:
        say("launch", f"error: {error}")
        return 1
    return run_kept(lambda signals: run_node(plan, signals))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"{rest}\nExample configs, systemd units, Compose file and runbook are in {Path(__file__).parent}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print memory of a rank, size of a checkpoint, steps and loaders, and end; more options: stoker-train --help",
    )
    parser.add_argument(
        "--no-loaders", action="store_true", help="the loaders run elsewhere; cluster.loader_addresses names them"
    )
    parser.add_argument(
        "--ready-deadline-s",
        type=float,
        default=600.0,
        metavar="S",
        help="all loaders must be ready after this many seconds, unprepared data included (default: 600); with --no-loaders the "
        "trainer waits for trainer.feed.connect_deadline_s instead",
    )
    parser.add_argument(
        "--loader-restarts",
        type=_count,
        default=10,
        metavar="N",
        help="restart a loader that dies at most this often in a run, on the same address; after that, training continues with "
        "the others (default: 10)",
    )
    return parser.parse_args(arguments)


def plan_command(options: argparse.Namespace) -> list[str]:
    """The trainer's own plan of the run."""
    overrides = [part for value in options.set for part in ("--set", value)]
    return [sys.executable, str(ROOT / "trainer" / "main.py"), "--plan", "--config", str(options.config), *overrides]


def _count(text: str) -> int:
    """argparse type: an integer that is not negative."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a count: write 0 or more")
    return int(text)


def make_plan(options: argparse.Namespace, environment: Mapping[str, str]) -> Plan:
    """The plan of what runs on this node. Raises ConfigError."""
    config = load_config(options.config, options.set)
    placement = config.cluster.component_placement
    if config.cluster.num_nodes != 1:
        raise ConfigError(
            f"cluster.num_nodes is {config.cluster.num_nodes}: launch.py starts one node; on several, run "
            "deploy/ray_launch.py"
        )
    if not placement.trainer:
        raise ConfigError(
            "cluster.component_placement.trainer is empty: name the slots to train on, e.g. `trainer: 0-1`"
        )
    common = ["--config", str(options.config), *(part for value in options.set for part in ("--set", value))]
    num_loaders = 0 if options.no_loaders else len(placement.dataloader)
    devices = find_devices(environment, placement.trainer)
    base = {**environment, "PYTHONPATH": _python_path(environment), "PYTHONUNBUFFERED": "1"}

    def trainer(addresses: Sequence[str]) -> list[str]:
        return trainer_command(common, addresses or config.cluster.loader_addresses, len(placement.trainer), devices)

    return Plan(
        loaders=LoaderPlan(
            commands=tuple(
                tuple(loader_command(common, config, num_loaders, slot)) for slot in placement.dataloader[:num_loaders]
            ),
            environment=base,
            ready_deadline_s=options.ready_deadline_s,
            max_restarts=options.loader_restarts,
        ),
        trainer=trainer,
        trainer_environment=trainer_environment(base, len(placement.trainer), devices),
        completion_record=Path(config.trainer.output_dir) / "summary.json",
    )


def loader_command(common: Sequence[str], config: Config, num_loaders: int, slot: int) -> list[str]:
    """`loader-serve` on a free port of the loopback; loaders of one node share its cores.

    slot: its `dataloader` slot, which is its GPU where `loader.device` is cuda."""
    command = [sys.executable, "-m", "loader_service.cli", "serve", *common, "--bind", "tcp://127.0.0.1:*"]
    if config.loader.cores == 0 and num_loaders > 1:
        command += ["--set", f"loader.cores={max(1, _num_cores() // num_loaders)}"]
    if config.loader.device == "cuda":
        command += ["--device", f"cuda:{slot}"]
    return command


def trainer_command(
    common: Sequence[str],
    addresses: Sequence[str],
    num_ranks: int,
    devices: Sequence[str] | None,
    script: Path = ROOT / "trainer" / "main.py",
) -> list[str]:
    """DeepSpeed's own launcher, kept to this node; devices: what each rank gets, None on CPU."""
    where = ["--num_gpus", str(num_ranks)] if devices is None else ["--include", "localhost:" + ",".join(devices)]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *("--hostfile", os.devnull),  # no file: a stray /job/hostfile would send the run to other machines
        *where,
        *("--master_port", str(free_port())),
        str(script),
        *common,
        *("--set", f"cluster.loader_addresses={json.dumps(list(addresses))}"),
    ]


def trainer_environment(
    environment: Mapping[str, str], num_ranks: int, devices: Sequence[str] | None
) -> dict[str, str]:
    """Environment of the ranks, which share the cores. OMP_NUM_THREADS is not changed if the user has set it."""
    result = dict(environment)
    result.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // num_ranks)))
    if devices is None:
        result["DS_ACCELERATOR"] = "cpu"
    else:
        result.pop("CUDA_VISIBLE_DEVICES", None)  # its numbers are in `devices` already
    return result


def find_devices(environment: Mapping[str, str], slots: Sequence[int]) -> list[str] | None:
    """Device number of each trainer slot; None where ranks run on the CPU. Raises ConfigError if a device is missing.

    Slots count what CUDA_VISIBLE_DEVICES shows: with `4,6` there, slot 1 is device 6.
    """
    accelerator = environment.get("DS_ACCELERATOR", "")
    if accelerator == "cpu" or not (accelerator or any(Path(file).exists() for file in _DEVICE_FILES)):
        return None
    if accelerator not in ("", "cuda"):
        return [str(slot) for slot in slots]
    count = _count_cuda_devices(environment)
    if count == 0 and not accelerator:
        return None
    if max(slots) >= count:
        raise ConfigError(
            f"cluster.component_placement.trainer names slot {max(slots)}, but this node shows {count} devices: name "
            f"slots below {count}, or set DS_ACCELERATOR=cpu to train on the CPU"
        )
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    numbers = [name.strip() for name in visible.split(",")] if visible is not None else [str(i) for i in range(count)]
    if not all(number.isdigit() for number in numbers):
        raise ConfigError(f"CUDA_VISIBLE_DEVICES is {visible!r}: DeepSpeed takes device numbers only, e.g. 0,1")
    return [numbers[slot] for slot in slots]


def _count_cuda_devices(environment: Mapping[str, str]) -> int:
    question = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run(
        [sys.executable, "-c", question], env=dict(environment), capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"torch cannot be imported to count the devices ({last}): install stoker[train]")
    return int(answer.stdout.split()[-1])


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _python_path(environment: Mapping[str, str]) -> str:
    """PYTHONPATH with this checkout first, so that child processes run its code."""
    return os.pathsep.join([*SOURCE_ROOTS, *filter(None, [environment.get("PYTHONPATH")])])


if __name__ == "__main__":
    sys.exit(main())
