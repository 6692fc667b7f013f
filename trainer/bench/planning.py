"""`loader-bench --plan`: measure for some seconds, fit the model of `capacity`, print what runs of other sizes need."""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import psutil

from stoker_proto.config import Config
from stoker_proto.errors import ConfigError, StokerError
from trainer.bench.capacity import BUSY, FRAMING, Measured, Model, Need, fit, need

_STEPS = 200
"""Of each of the two pulls, unless `--batches` says otherwise."""
_START_S = 60.0
Pull = Callable[[Config, argparse.Namespace], dict[str, Any]]
"""Pulls as `loader-bench` does without `--plan`; returns its figures."""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `--plan`."""
    group = parser.add_argument_group(
        "plan", "estimates what runs of other sizes need, from some seconds at full speed"
    )
    group.add_argument("--plan", action="store_true", help="print the plan; needs --rate")
    group.add_argument(
        "--gpus", default="8,64,512", metavar="N,...", help="sizes of runs, in GPUs; default: %(default)s"
    )
    group.add_argument("--rate", type=float, metavar="R", help="samples per second that one GPU trains")
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")


def check_plan_arguments(config: Config, arguments: argparse.Namespace) -> list[int]:
    """The sizes. Raises ConfigError."""
    if arguments.rate is None or not 0 < arguments.rate < float("inf"):
        raise ConfigError(f"--rate is {arguments.rate}: --plan needs the samples per second of one GPU, above 0")
    if arguments.gpus_per_node < 1:
        raise ConfigError(f"--gpus-per-node is {arguments.gpus_per_node}: it must be 1 or more")
    if arguments.step_time_ms:
        raise ConfigError("--plan measures at full speed: leave --step-time-ms out")
    if config.cluster.security.loader_key:
        raise ConfigError(
            "--plan measures loaders without keys; CURVE adds about 1.7 CPU s per GB, both sides together"
        )
    if any(urlsplit(address).scheme != "tcp" for address in config.cluster.loader_addresses):
        raise ConfigError("--plan measures loaders by their addresses: name each with --connect tcp://HOST:PORT")
    parts = arguments.gpus.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--gpus is {arguments.gpus!r}: write whole numbers above 0, such as 8,64,512")
    return [int(part) for part in parts]


def print_plan(config: Config, arguments: argparse.Namespace, pull: Pull) -> None:
    """Measure, fit, print. Raises StokerError."""
    sizes = check_plan_arguments(config, arguments)
    short = argparse.Namespace(**{**vars(arguments), "batches": arguments.batches or _STEPS})
    measured = measure(config, short, pull)
    ceiling = measure_ceiling(config, short, pull)
    model = fit(measured, ceiling, lanes=config.data.order.lanes * len(config.data.paths(arguments.split)))
    memory_gb = (config.loader.cache_mb + config.loader.unread_mb + 32) / 1024
    needs = [
        need(model, size, arguments.rate, gpus_per_node=arguments.gpus_per_node, loader_memory_gb=memory_gb)
        for size in sizes
    ]
    print(as_text(measured, model, needs, arguments.rate, arguments.gpus_per_node, memory_gb))
    if arguments.json:
        tree = {"measured": dataclasses.asdict(measured), "model": dataclasses.asdict(model)}
        print(json.dumps({**tree, "needs": [dataclasses.asdict(each) for each in needs]}))


def measure(config: Config, arguments: argparse.Namespace, pull: Pull) -> Measured:
    """From the real loaders. Raises StokerError."""
    psutil.cpu_percent()
    figures = pull(config, arguments)
    busy = psutil.cpu_percent() / 100
    if not figures["loader_threads"]:
        raise StokerError("the loaders do not say how many threads they have: are they of an older version?")
    hosts = {urlsplit(address).hostname for address in config.cluster.loader_addresses}
    return Measured(
        samples_per_s=figures["samples_per_s_steady"],
        num_loaders=figures["loaders"],
        num_threads=figures["loader_threads"],
        loader_cpu_ms=figures["loader_cpu_ms_per_sample"],
        client_cpu_ms=figures["client_cpu_ms_per_sample"],
        wire_bytes=figures["wire_bytes_per_sample"],
        wait_share=figures["data_wait_frac_steady"],
        host_busy=busy,
        loaders_here=bool(hosts & {"127.0.0.1", "localhost", "::1"}),
    )


def measure_ceiling(config: Config, arguments: argparse.Namespace, pull: Pull) -> float:
    """samples/s that one rank takes from a null loader, which runs on this host. Raises StokerError."""
    with null_loader(config.cluster.loader_addresses[0]) as address:
        cluster = dataclasses.replace(config.cluster, loader_addresses=(address,))
        alone = argparse.Namespace(**{**vars(arguments), "ranks": 1})
        figures = pull(dataclasses.replace(config, cluster=cluster), alone)
    rate: float = figures["samples_per_s_steady"]
    return rate


@contextmanager
def null_loader(upstream: str) -> Iterator[str]:
    """A null loader in a process of its own; yields its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer.bench.null_loader", upstream],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    try:
        address = process.stdout.readline().strip()
        if not address:
            raise StokerError(f"the null loader did not start: exit code {process.wait(_START_S)}")
        yield address
    finally:
        process.stdin.close()
        try:
            process.wait(_START_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


_LIMITS = {
    "cores": "its threads were busy",
    "pace": "its threads were not busy: something else limits it",
    "estimate": "by its CPU time: the loaders were not the limit of this pull, or they share this host's cores with it",
}


def as_text(
    measured: Measured, model: Model, needs: list[Need], rate: float, gpus_per_node: int, memory_gb: float
) -> str:
    """What was measured, what it means, and a table."""
    lines = [
        f"measured       {measured.samples_per_s:.0f} samples/s from {measured.num_loaders} loaders with {measured.num_threads} "
        f"threads; ranks waited {100 * measured.wait_share:.0f}% of the time;",
        f"               this host was {100 * measured.host_busy:.0f}% busy",
        f"one loader     {model.loader_samples_per_s:.0f} samples/s: {_LIMITS[model.loader_limit]}",
        f"one rank       {model.rank_samples_per_s:.0f} samples/s from a null loader: the ceiling of client and wire here",
        f"costs          loader {model.loader_cpu_ms:.3f}, client {model.client_cpu_ms:.3f} CPU ms per sample; "
        f"{model.wire_bytes:.0f} bytes per sample",
        f"assumptions    {rate:g} samples/s per GPU, {gpus_per_node} GPUs per node; no part more than {100 * BUSY:.0f}% busy;",
        f"               loaders, cores and lanes ({model.lanes}) as measured; {100 * (FRAMING - 1):.0f}% for packet headers;",
        f"               {memory_gb:.1f} GB per loader above an idle one (loader.cache_mb, unread_mb);",
        "               the cost of this pull: a first epoch; later ones from the loaders' caches cost less",
        "",
        f"{'GPUs':>6}{'samples/s':>11}{'loaders':>9}{'cores':>7}{'memory GB':>11}{'Gbit/s':>9}{'per node':>10}{'its NIC':>9}"
        f"{'per loader':>12}{'its NIC':>9}{'client cores per node':>23}",
    ]
    for each in needs:
        lines.append(
            f"{each.gpus:>6}{each.samples_per_s:>11.0f}{each.loaders:>9}{each.loader_cores:>7}{each.memory_gb:>11.0f}"
            f"{each.network_gbit:>9.2f}{each.node_gbit:>10.2f}{_nic(each.node_nic_gbit):>9}{each.loader_gbit:>12.2f}"
            f"{_nic(each.loader_nic_gbit):>9}{each.client_cores_per_node:>23.1f}"
        )
    for binds in dict.fromkeys(each.binds for each in needs):
        sizes = ", ".join(str(each.gpus) for each in needs if each.binds == binds)
        lines.append(f"what binds at {sizes} GPUs: {binds}")
    return "\n".join(lines)


def _nic(gbit: int | None) -> str:
    return "none" if gbit is None else f"{gbit}G"
