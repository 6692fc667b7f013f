"""From the command line to this node's part of a run on several nodes."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.keeper import run_kept
from deploy.launch import count_devices, python_environment
from deploy.nodes.facts import config_values, versions
from deploy.nodes.membership import Membership, own_arguments
from deploy.nodes.plan import LocalPlan, RunOptions, make_local_plan
from deploy.nodes.run import NodesPlan, run_nodes
from deploy.nodes.ssh import ssh_command
from stoker_proto.config import Config
from stoker_proto.errors import ConfigError


def run_on_nodes(options: argparse.Namespace, config: Config, membership: Membership) -> int:
    """This node's part. Returns the exit code. Raises ConfigError."""
    plan = make_nodes_plan(options, config, membership, os.environ)
    return run_kept(lambda signals: run_nodes(plan, signals))


def make_nodes_plan(
    options: argparse.Namespace, config: Config, membership: Membership, environment: Mapping[str, str]
) -> NodesPlan:
    """What this node brings to the run. Raises ConfigError."""
    security = config.cluster.security
    if not options.insecure and (security.loader_secret is None or security.rank_secret is None):
        raise ConfigError(
            f"{membership.num_nodes} nodes talk over the network, and cluster.security names no keys: make them with loader-keys "
            "and name all four files on every node, or say --insecure on a network that only you can reach"
        )
    run_options = RunOptions(
        common=("--config", str(options.config), *(part for one in options.set for part in ("--set", one))),
        environment=_without_torchrun(python_environment(environment)),
        has_loaders=not options.no_loaders,
        insecure=options.insecure,
        slots_per_node=membership.slots_per_node,
        ready_deadline_s=options.ready_deadline_s,
        loader_restarts=options.loader_restarts,
    )

    def facts() -> dict[str, Any]:
        return {
            "host": socket.gethostname(),
            "devices": count_devices(environment),
            "versions": versions(),
            "config": config_values(config),
        }

    def local_plan(agreed: list[dict[str, Any]]) -> LocalPlan:
        return make_local_plan(membership.node, agreed, config, run_options)

    def other_command(node: int, host: str) -> list[str]:
        return ssh_command(options.ssh, host, str(Path.cwd()), environment, launcher_command(options, membership, node))

    return NodesPlan(
        membership=membership,
        security=security,
        node_address=options.node_address,
        facts=facts,
        local_plan=local_plan,
        other_command=other_command,
        nodes_deadline_s=options.nodes_deadline_s,
        lost_s=options.node_lost_s,
    )


def _without_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """Ranks meet in a store of their own, not in that of a torchrun that started this launcher."""
    return {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")}


def launcher_command(options: argparse.Namespace, membership: Membership, node: int) -> list[str]:
    """The same command for another node."""
    values = [(f"--{name.replace('_', '-')}", getattr(options, name)) for name in _SAME_EVERYWHERE]
    flags = [f"--{name.replace('_', '-')}" for name in ("no_loaders", "insecure") if getattr(options, name)]
    return [
        *(sys.executable, str(_LAUNCH)),
        *("--config", str(options.config), *(part for one in options.set for part in ("--set", one))),
        *own_arguments(membership, node, values),
        *flags,
    ]


_LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
_SAME_EVERYWHERE = ("ready_deadline_s", "loader_restarts", "nodes_deadline_s", "node_lost_s")
