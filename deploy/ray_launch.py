"""A run on a Ray cluster: loaders and DeepSpeed ranks on its nodes, supervised; one exit code.

    ray start --head                                     # on the first machine
    ray start --address FIRST:6379                       # on the others
    python deploy/ray_launch.py --config my.yaml         # on any of them; text and chat configs too

It joins the running cluster (--address, RAY_ADDRESS, or the one on this machine), or starts one on this machine alone.
`cluster.num_nodes` and `cluster.component_placement` say what runs where. Data travels over ZeroMQ, with keys made for the run.
All nodes need this checkout and its Python at the same path, the model, and an output_dir that they share.
Ctrl-C ends ranks, then loaders, and leaves nothing on the cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import zmq

ROOT = Path(__file__).resolve().parent.parent
SOURCE_ROOTS = (str(ROOT), str(ROOT / "proto"))
if (
    __name__ == "__main__"
):  # `python deploy/ray_launch.py` puts deploy/ first on the path; the source roots belong there
    sys.path[0:1] = SOURCE_ROOTS

from deploy.child import say  # noqa: E402  (the path must stand before)
from deploy.cluster.agent import FOLDER, LOADERS_FILE  # noqa: E402
from deploy.cluster.plan import ClusterPlan, NodePlan, place, slots_per_node  # noqa: E402
from deploy.keeper import STOP_SIGNALS, Signals, run_kept  # noqa: E402
from stoker_proto.config import Config  # noqa: E402
from stoker_proto.config.reader import add_config_arguments, load_config  # noqa: E402
from stoker_proto.errors import ConfigError  # noqa: E402
from stoker_proto.host.names import look_up_host  # noqa: E402
from stoker_proto.wire.keys import write_pair  # noqa: E402

_CONNECT_S = 10.0
"""To reach a cluster's head."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    options = parse_arguments(arguments)
    try:
        config = load_config(options.config, options.set)
    except ConfigError as error:
        say("ray", f"error: {error}")
        return 1
    return run_kept(lambda signals: run_on_cluster(options, config, signals))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_config_arguments(parser)
    add = parser.add_argument
    add(
        "--address",
        metavar="ADDR",
        help="HOST:PORT of a running cluster, or `local`: start one here; default: join, else start",
    )
    add("--no-loaders", action="store_true", help="the loaders run elsewhere; cluster.loader_addresses names them")
    add("--data-resource", metavar="NAME", help="loaders run only on nodes that were started with this resource")
    add(
        "--nodes-deadline-s",
        type=float,
        default=120.0,
        metavar="S",
        help="the cluster must have room within (default: 120)",
    )
    add(
        "--ready-deadline-s", type=float, default=600.0, metavar="S", help="loaders must be ready within (default: 600)"
    )
    add("--loader-restarts", type=int, default=10, metavar="N", help="of each loader on its node (default: 10)")
    add(
        "--trainer-restarts",
        type=int,
        default=3,
        metavar="N",
        help="of all ranks, from the newest checkpoint (default: 3)",
    )
    return parser.parse_args(arguments)


def run_on_cluster(options: argparse.Namespace, config: Config, signals: Signals) -> int:
    """Join or start the cluster, and run. Returns the exit code."""
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # each line of each process is shown
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray

        from deploy.cluster.run import ClusterRun
    except ModuleNotFoundError:
        say("ray", "error: Ray is not installed: pip install -c deploy/constraints.txt -e '.[ray]'")
        return 1
    try:
        join(ray, options.address)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):  # Ray has set its own
            signal.signal(number, signals._note)
        plan = make_plan(options, config, [one for one in ray.nodes() if one["Alive"]])
        return ClusterRun(plan, signals).run()
    except (ConfigError, ConnectionError) as error:
        say("ray", f"error: {error}")
        return 1
    finally:
        ray.shutdown()


def join(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or start one. Raises ConnectionError."""
    where = address or os.environ.get("RAY_ADDRESS") or "auto"
    environment = {"PYTHONPATH": os.pathsep.join(SOURCE_ROOTS), "PYTHONUNBUFFERED": "1"}
    common = {"runtime_env": {"env_vars": environment}, "log_to_driver": True, "logging_level": "warning"}
    if where != "local":
        try:
            answers(where)
            ray.init(address=where, **common)
            return
        except OSError as error:  # ConnectionError is one
            if where != "auto":
                raise ConnectionError(
                    f"no Ray cluster answers at {where} ({str(error).splitlines()[0]}): start it with `ray start --head`, or "
                    "leave --address and RAY_ADDRESS out to start one on this machine"
                ) from error
    say("ray", "no running cluster was named or found: starting one on this machine")
    ray.init(address="local", include_dashboard=False, **common)


def answers(where: str) -> None:
    """Ray itself tries for minutes where nothing listens. Raises OSError."""
    host, separator, port = where.rpartition(":")
    if separator and port.isdecimal():
        look_up_host(host.strip("[]"), int(port))
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()


def make_plan(options: argparse.Namespace, config: Config, nodes: Sequence[dict[str, Any]]) -> ClusterPlan:
    """The plan of the run. Raises ConfigError."""
    placement, num_nodes = config.cluster.component_placement, config.cluster.num_nodes
    gpus = [int(one["Resources"].get("GPU", 0)) for one in nodes]
    per_node = slots_per_node(placement, num_nodes, gpus)
    plans = place(placement, num_nodes, per_node, has_gpus=any(gpus))
    if options.no_loaders:
        plans = tuple(NodePlan(ranks=one.ranks, devices=one.devices) for one in plans)
    cores = config.loader.cores or 1
    common = [
        "--config",
        str(Path(options.config).resolve()),
        *(part for value in options.set for part in ("--set", value)),
    ]
    has_loaders = any(one.loaders for one in plans)
    keys, own = ({}, []) if not has_loaders or config.cluster.security.loader_secret else make_keys()
    serve = [sys.executable, "-m", "loader_service.cli", "serve", *common, *own, "--set", f"loader.cores={cores}"]
    listed = [f"file:{FOLDER}/{LOADERS_FILE}"] if has_loaders else list(config.cluster.loader_addresses)
    rank = [sys.executable, str(ROOT / "trainer" / "main.py"), *common, *own]
    rank += ["--set", f"cluster.loader_addresses={json.dumps(listed)}"]
    rank_environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    if not any(gpus):
        rank_environment["DS_ACCELERATOR"] = "cpu"
    return ClusterPlan(
        nodes=plans,
        resources=tuple(one.resources(cores, options.data_resource) for one in plans),
        files=keys,
        loader=lambda address: [*serve, "--bind", f"tcp://{address}:*"],
        rank=rank,
        working_folder=str(Path.cwd()),
        rank_environment=rank_environment,
        data_paths=local_paths(config),
        completion_record=str(Path(config.trainer.output_dir).resolve() / "summary.json"),
        nodes_deadline_s=options.nodes_deadline_s,
        ready_deadline_s=options.ready_deadline_s,
        loader_restarts=options.loader_restarts,
        trainer_restarts=options.trainer_restarts,
    )


def make_keys() -> tuple[dict[str, str], list[str]]:
    """Two key pairs for this run alone: (file name -> content, the overrides that name them in an agent's folder)."""
    with TemporaryDirectory() as folder:
        for name in ("loader", "rank"):
            write_pair(Path(folder), name, *zmq.curve_keypair())
        files = {path.name: path.read_text() for path in Path(folder).iterdir()}
    security = {
        "loader_secret": f"{FOLDER}/loader.key_secret",
        "allowed_ranks": f"[{FOLDER}/rank.key]",
        "loader_key": f"{FOLDER}/loader.key",
        "rank_secret": f"{FOLDER}/rank.key_secret",
    }
    return files, [part for key, value in security.items() for part in ("--set", f"cluster.security.{key}={value}")]


def local_paths(config: Config) -> tuple[str, ...]:
    """The files and folders of the data paths that a node with loaders must have; of a glob, the part before its first sign."""
    entries = [entry for split in ("train", "val") for entry in config.data.paths(split) if "://" not in entry]
    return tuple(dict.fromkeys(_without_glob(entry) for entry in entries))


def _without_glob(entry: str) -> str:
    parts = Path(entry).parts
    plain = next((n for n, part in enumerate(parts) if any(sign in part for sign in "*?[")), len(parts))
    return str(Path(*parts[:plain])) if plain else "."


if __name__ == "__main__":
    sys.exit(main())
