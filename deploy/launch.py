"""Starts a loader per `dataloader` slot, and DeepSpeed on exactly the `trainer` slots. No process outlives the launcher.

    python deploy/launch.py --config deploy/configs/demo.yaml --set trainer.epochs=1
    stoker-launch --config my.yaml                          # the same, where the package is installed

The exit code is the trainer's, and 0 only if the trainer wrote summary.json in its output_dir. A loader that dies is restarted.
Ctrl-C and SIGTERM go to the trainer, then the loaders drain; a second signal kills all. SIGUSR1: the run saves and ends with 75.
Several nodes: the same command on each, or on node 0 with a hostfile (`deploy.nodes.membership`).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
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
from deploy.nodes.membership import add_arguments, find_membership  # noqa: E402
from stoker_proto.config import Config  # noqa: E402
from stoker_proto.config.reader import add_config_arguments, load_config  # noqa: E402
from stoker_proto.errors import ConfigError  # noqa: E402
from stoker_proto.host.ports import free_port  # noqa: E402

_DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these exists where torch can find a CUDA or ROCm device; asking torch itself costs seconds."""
_START_MARGIN_S = 60.0
"""How much longer ranks wait for the loaders than the launcher does, which ends the run then."""
_KILL_MARGIN_S = 20.0
"""How much longer the launcher waits for ranks that save than `trainer.checkpoint.stop_grace_s`, after which they end."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    if options.plan:
        return subprocess.run(plan_command(options), check=False).returncode
    try:
        config = load_config(options.config, options.set)
        membership = find_membership(options, os.environ, config.cluster.num_nodes)
        if membership is not None:
            from deploy.nodes.start import run_on_nodes  # needs this module

            return run_on_nodes(options, config, membership)
        plan = make_plan(options, os.environ)
    except ConfigError as error:
        say("launch", f"error: {error}")
        return 1
    say("launch", plan.cores)
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
    add_arguments(parser)
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
    if not placement.trainer:
        raise ConfigError(
            "cluster.component_placement.trainer is empty: name the slots to train on, e.g. `trainer: 0-1`"
        )
    common = ["--config", str(options.config), *(part for value in options.set for part in ("--set", value))]
    num_loaders = 0 if options.no_loaders else len(placement.dataloader)
    devices = find_devices(environment, placement.trainer)
    base = python_environment(environment)

    reserved = loader_cores(config, num_loaders)
    ranks_environment = trainer_environment(base, len(placement.trainer), devices, reserved)
    return Plan(
        cores=describe_cores(ranks_environment, len(placement.trainer), num_loaders, reserved),
        loaders=LoaderPlan(
            commands=tuple(
                tuple(loader_command(common, config, num_loaders, slot)) for slot in placement.dataloader[:num_loaders]
            ),
            environment=base,
            ready_deadline_s=options.ready_deadline_s,
            max_restarts=options.loader_restarts,
        ),
        trainer=trainer_command(
            common,
            None if num_loaders else config.cluster.loader_addresses,
            len(placement.trainer),
            devices,
            start_within_s=options.ready_deadline_s + _START_MARGIN_S,
        ),
        trainer_environment=ranks_environment,
        completion_record=Path(config.trainer.output_dir) / "summary.json",
        trainer_grace_s=config.trainer.checkpoint.stop_grace_s + _KILL_MARGIN_S,
    )


def loader_command(
    common: Sequence[str], config: Config, num_loaders: int, slot: int, bind: str = "tcp://127.0.0.1:*"
) -> list[str]:
    """`loader-serve` on a free port; loaders of one node share its cores.

    slot: its `dataloader` slot on this node, which is its GPU where `loader.device` is cuda."""
    command = [sys.executable, "-m", "loader_service.cli", "serve", *common, "--bind", bind]
    if config.loader.cores == 0 and num_loaders > 1:
        command += ["--set", f"loader.cores={max(1, _num_cores() // num_loaders)}"]
    if config.loader.device == "cuda":
        command += ["--device", f"cuda:{slot}"]
    return command


def trainer_command(
    common: Sequence[str],
    addresses: Sequence[str] | None,
    num_ranks: int,
    devices: Sequence[str] | None,
    script: Path = ROOT / "trainer" / "main.py",
    *,
    start_within_s: float = 600.0,
) -> list[str]:
    """DeepSpeed's launcher of one node; devices: what each rank gets, None on CPU.

    addresses: of the loaders; None: the ranks are told on stdin, within `start_within_s` (`stoker_proto.host.start`).
    DeepSpeed's runner, which would start it, imports DeepSpeed for that: 2 CPU s more before the ranks begin.
    """
    numbers = list(range(num_ranks)) if devices is None else [int(device) for device in devices]
    command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", world_argument({"localhost": numbers})]
    command += ["--master_addr=127.0.0.1", "--log_level=warning"]  # its lines about itself would hide a loader's error
    if addresses is None:
        # The port comes on stdin too. Nobody can meet at port 0, should that be missed.
        return [*command, "--master_port=0", str(script), *common, "--start-within-s", f"{start_within_s:g}"]
    named = f"cluster.loader_addresses={json.dumps(list(addresses))}"
    return [*command, f"--master_port={free_port()}", str(script), *common, "--set", named]


def world_argument(world: Mapping[str, Sequence[int]]) -> str:
    """For DeepSpeed's launcher of one node: the name of each node -> the devices of its ranks."""
    text = json.dumps({name: list(numbers) for name, numbers in world.items()})
    return "--world_info=" + base64.urlsafe_b64encode(text.encode()).decode()


def trainer_environment(
    environment: Mapping[str, str], num_ranks: int, devices: Sequence[str] | None, num_loader_cores: int = 0
) -> dict[str, str]:
    """Environment of the ranks, which share the cores that are left to them. What the user has set is not changed.

    Without OMP_WAIT_POLICY, a thread of OpenMP that waits for work keeps its core busy, which loaders and other ranks need.
    """
    result = dict(environment)
    result.setdefault("OMP_NUM_THREADS", str(max(1, (_num_cores() - num_loader_cores) // max(num_ranks, 1))))
    result.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if devices is None:
        result["DS_ACCELERATOR"] = "cpu"
    else:
        result.pop("CUDA_VISIBLE_DEVICES", None)  # its numbers are in `devices` already
    return result


def loader_cores(config: Config, num_loaders: int) -> int:
    """Cores that the ranks of a node leave to its loaders: `loader.cores` of each, else a quarter of all, and never the last.

    Loaders may use more of them while ranks wait; a CPU rank needs far more time for a sample than a loader.
    """
    wanted = config.loader.cores * num_loaders or (-(-_num_cores() // 4) if num_loaders else 0)
    return min(wanted, _num_cores() - 1)


def describe_cores(environment: Mapping[str, str], num_ranks: int, num_loaders: int, num_loader_cores: int) -> str:
    """One line: who gets which cores of this node."""
    threads, policy = environment["OMP_NUM_THREADS"], environment["OMP_WAIT_POLICY"]
    return (
        f"{_num_cores()} cores: {num_ranks} ranks with OMP_NUM_THREADS={threads} and OMP_WAIT_POLICY={policy}; "
        f"{num_loader_cores} cores are left to {num_loaders} loaders. Set these variables or loader.cores to share them otherwise"
    )


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


def count_devices(environment: Mapping[str, str]) -> int:
    """CUDA or ROCm devices that this node shows; 0 where ranks run on the CPU. Raises ConfigError."""
    accelerator = environment.get("DS_ACCELERATOR", "")
    if accelerator not in ("", "cuda") or not (accelerator or any(Path(file).exists() for file in _DEVICE_FILES)):
        return 0
    return _count_cuda_devices(environment)


def _count_cuda_devices(environment: Mapping[str, str]) -> int:
    question = "import torch; print(torch.cuda.device_count())"
    answer = subprocess.run(
        [sys.executable, "-c", question], env=dict(environment), capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"torch cannot be imported to count the devices ({last}): install stoker[train]")
    return int(answer.stdout.split()[-1])


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def python_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """With PYTHONPATH that has this checkout first, so that child processes run its code."""
    path = os.pathsep.join([*SOURCE_ROOTS, *filter(None, [environment.get("PYTHONPATH")])])
    return {**environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
