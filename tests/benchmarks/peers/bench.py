"""`make bench-peers`: what a sample costs Stoker and other loaders, on the same files, in interleaved rounds.

Each loader runs in processes of its own, in its own virtual environment with pinned versions (requirements-*.txt; pip installs
them below the work folder on the first run: 12 GB for all). A round of a loader is three runs:

  1. a new process, two epochs:  CPU of the first epoch by kind of process, samples/s, first batch, memory; CPU of the second
  2. the same again, one epoch:  CPU of a second run
  3. a new process from the middle of the epoch: time and CPU to the first batch, and whether what follows is what run 1 had there

The batches of the peers are Base64 JPEGs, a trajectory's samples one after the other. Stoker also shuffles within a window of
trajectories, and its consumer decodes the JPEGs into a uint8 batch: its figures have more in them.
CPU time counts: wall time on a shared machine says little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract import BATCH, half
from data import LENGTH, LEROBOT, NPZ, SIZE, make_data
from environments import Environment, NotInstalled, environment, own
from measure import Measured, PeerError, measure
from table import plot, summary, table
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A row of the table."""

    title: str
    script: str
    data: str
    """NPZ or LEROBOT."""
    requirements: str | None = None
    """Name of its environment; None: the one that runs the harness."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Kind of process -> pattern of its command line; all others but the script itself are `workers`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    most_samples: int = 10**9
    """Of an epoch, where a sample costs so much that a whole epoch would take minutes."""


_LOADER = {"loader": "loader_service"}
PEERS: Mapping[str, Peer] = {
    "stoker": Peer(title="Stoker", script="stoker.py", data=NPZ, kinds=_LOADER),
    "straight": Peer(title="the same libraries by hand", script="straight.py", data=NPZ, requirements="spdl"),
    "torch": Peer(title="torch DataLoader, trajectory order", script="torch_trajectories.py", data=NPZ, requirements="torch"),
    "torch-usual": Peer(
        title="the same with np.load and base64", script="torch_trajectories.py", data=NPZ, requirements="torch",
        environment={"PEER_LIBRARIES": "usual"},
    ),
    "torch-samples": Peer(
        title="torch DataLoader, NPZ opened per sample", script="torch_samples.py", data=NPZ, requirements="torch",
        most_samples=128,
    ),
    "tfdata": Peer(
        title="tf.data service", script="tfdata_service.py", data=NPZ, requirements="tfdata", kinds={"server": "service.py serve"}
    ),
    "spdl": Peer(title="SPDL", script="spdl_threads.py", data=NPZ, requirements="spdl"),
    "grain": Peer(title="Grain", script="grain_loader.py", data=NPZ, requirements="grain"),
    "ray": Peer(
        title="Ray Data", script="ray_data.py", data=NPZ, requirements="ray",
        kinds={"daemons": "gcs_server|raylet/raylet|dashboard|log_monitor|runtime_env/agent"},
    ),
    "stoker-lerobot": Peer(title="Stoker, LeRobot set", script="stoker.py", data=LEROBOT, kinds=_LOADER),
    "lerobot": Peer(
        title="LeRobot's own loader", script="lerobot_loader.py", data=LEROBOT, requirements="lerobot", most_samples=640
    ),
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    rows = "\n".join(f"  {name:16}{peer.title} ({peer.data})" for name, peer in PEERS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"rows:\n{rows}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trajectories", type=int, default=64, help="of 50 frames 256x256; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved; medians and ranges; default: %(default)s")
    parser.add_argument("--only", metavar="ROW,...", help="the rows to measure; default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that load; default: %(default)s")
    parser.add_argument(
        "--own-environment",
        action="store_true",
        help="install nothing: run all scripts with the Python that runs this one",
    )
    parser.add_argument("--limit-s", type=float, default=600, help="for one run of one loader; default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build/bench", help="data and environments; default: build/bench"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures, versions, load, machine")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables in markdown")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG (needs the extra `bench`)")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(PEERS)
    if unknown := [name for name in names if name not in PEERS]:
        parser.error(f"--only: no row named {', '.join(unknown)}; there are {', '.join(PEERS)}")
    for name in ("trajectories", "rounds", "workers"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} is {getattr(arguments, name)}: it must be 1 or more")
    if arguments.plot:
        import matplotlib  # noqa: F401 - not after an hour of measuring
    arguments.folder, arguments.only = arguments.folder.resolve(), names
    return arguments


def main() -> None:
    """Install, make the data, run all rounds, print the tables."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        report = measure_all(arguments)
    except KeyboardInterrupt:
        sys.exit(130)  # what was running was ended on the way here
    tables = {
        data: {PEERS[name].title: row for name, row in rows.items()} for data, rows in report["rows"].items() if rows
    }
    for data, rows in tables.items():
        print(f"\n{data}, {report['conditions']}\n\n{table(rows, markdown=False)}")
    if arguments.json:
        _write(arguments.json, json.dumps(report, indent=1) + "\n")
    if arguments.markdown:
        _write(arguments.markdown, "\n\n".join(table(rows, markdown=True) for rows in tables.values()) + "\n")
    if arguments.plot:
        plot(tables, arguments.plot, report["conditions"])
    if not any("reason" not in row for rows in tables.values() for row in rows.values()):
        sys.exit("no row was measured")


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report; rows that failed have a reason in place of figures. Ctrl-C keeps the rounds that are complete, if any is."""
    began = time.gmtime()
    (arguments.folder / "peers").mkdir(parents=True, exist_ok=True)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
    reasons: dict[str, str] = {}
    with tqdm(total=len(arguments.only) * (1 + 3 * arguments.rounds), unit="run", file=sys.stderr) as bar:
        environments = install(arguments, reasons, bar)
        bar.set_description("data")
        data = {}
        for kind in sorted({PEERS[name].data for name in arguments.only}):
            ours = any(PEERS[name].script == "stoker.py" and PEERS[name].data == kind for name in arguments.only)
            data[kind] = make_data(kind, arguments.folder, arguments.trajectories, prepared=ours)
        for number in range(arguments.rounds):
            try:
                done = {}
                for name in [name for name in arguments.only if name not in reasons]:
                    bar.set_description(f"round {number + 1} of {arguments.rounds}: {name}")
                    try:
                        runs = three_runs(name, environments[name], data[PEERS[name].data], arguments, bar)
                    except PeerError as error:
                        reasons[name] = f"failed in round {number + 1}: {str(error).splitlines()[-1][:300]}"
                        tqdm.write(f"{name} failed: {error}", file=sys.stderr)
                    else:
                        done[name] = figures(*runs, expected=num_samples(PEERS[name], arguments))
            except KeyboardInterrupt:
                if not number:
                    raise
                break
            for name, row in done.items():
                rounds[name].append(row)
    rows: dict[str, dict[str, Any]] = {NPZ: {}, LEROBOT: {}}
    for name in arguments.only:
        rows[PEERS[name].data][name] = {"reason": reasons[name]} if name in reasons else summary(rounds[name])
    return {
        "conditions": conditions(arguments, rounds), "machine": machine(),
        "began": time.strftime("%Y-%m-%d %H:%M UTC", began),
        "versions": {name: environment.versions for name, environment in environments.items()},
        "rows": rows, "rounds": rounds,
    }  # fmt: skip


def install(arguments: argparse.Namespace, reasons: dict[str, str], bar: tqdm[Any]) -> dict[str, Environment]:
    """The environment of each row; rows that have none get a reason."""
    found = {}
    for name in arguments.only:
        bar.set_description(f"install {name}")
        try:
            wanted = None if arguments.own_environment else PEERS[name].requirements
            found[name] = environment(arguments.folder / "peers", wanted) if wanted else own()
        except NotInstalled as error:
            reasons[name] = f"not installed: {error}"
        bar.update()
    return found


def conditions(arguments: argparse.Namespace, rounds: Mapping[str, list[dict[str, Any]]]) -> str:
    """One line for tables and the picture."""
    loads = [figures["load"] for several in rounds.values() for figures in several]
    load = f"load average {min(loads):.1f} to {max(loads):.1f}" if loads else "nothing ran"
    return (
        f"{arguments.trajectories} trajectories x {LENGTH} frames {SIZE}x{SIZE}, {arguments.workers} workers, "
        f"{os.cpu_count()} cores, medians (ranges) of {max(map(len, rounds.values()))} interleaved rounds, {load}"
    )


def machine() -> dict[str, Any]:
    """Facts of the host, without its name."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "?",
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) // 1024
    return {
        "processor": model, "cores": os.cpu_count(), "memory_mb": memory, "kernel": platform.release(),
        "python": platform.python_version(),
    }  # fmt: skip


def num_samples(peer: Peer, arguments: argparse.Namespace) -> int:
    """Of an epoch of this row."""
    return min(peer.most_samples, LENGTH * arguments.trajectories)


def three_runs(
    name: str, environment: Environment, data: Mapping[str, Path], arguments: argparse.Namespace, bar: tqdm[Any]
) -> list[Measured]:
    """Two epochs; one epoch again; from the middle. Raises PeerError."""
    peer = PEERS[name]
    samples = num_samples(peer, arguments)
    runs = []
    for epochs, first_batch in ((2, 0), (1, 0), (1, half(-(-samples // BATCH)))):
        command = [
            str(environment.python),
            str(HERE / peer.script),
            str(data["config" if peer.script == "stoker.py" else "files"]),
        ]
        options = {"samples": samples, "workers": arguments.workers, "epochs": epochs, "first-batch": first_batch}
        command += [part for option, value in options.items() for part in (f"--{option}", str(value))]
        log = arguments.folder / "peers" / f"{name}.log"
        runs.append(measure(command, child_environment(peer), peer.kinds, log, arguments.limit_s))
        bar.update()
    return runs


def child_environment(peer: Peer) -> dict[str, str]:
    """Numeric libraries on one thread, as in production; our packages only where our own script runs."""
    found = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        **peer.environment,
    }
    return found | ({} if peer.requirements else {"PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}"})


def figures(run: Measured, again: Measured, resumed: Measured, *, expected: int) -> dict[str, Any]:
    """What a round says; CPU is per sample of an epoch, by kind of process."""
    ready, first, epoch, _, second = run.marks
    ready_again, _, epoch_again = again.marks
    ready_resumed, first_resumed, epoch_resumed = resumed.marks
    samples = epoch.data["samples"]
    kinds = {kind: 1e3 * (cpu_s - ready.cpu_s.get(kind, 0)) / samples for kind, cpu_s in epoch.cpu_s.items()}
    return {
        "kinds_cpu_ms": {kind: max(cost, 0.0) for kind, cost in kinds.items()},
        "cpu_ms": _cpu_ms(ready, epoch, samples),
        "consumer_cpu_ms": kinds["consumer"],
        "second_epoch_cpu_ms": _cpu_ms(epoch, second, second.data["samples"]),
        "second_epoch_consumer_cpu_ms": 1e3 * (second.cpu_s["consumer"] - epoch.cpu_s["consumer"]) / second.data["samples"],
        "second_run_cpu_ms": _cpu_ms(ready_again, epoch_again, epoch_again.data["samples"]),
        "samples_per_s": samples / (epoch.wall_s - ready.wall_s),
        "ready_s": ready.wall_s,
        "ready_cpu_s": sum(ready.cpu_s.values()),
        "first_batch_s": first.wall_s - ready.wall_s,
        "resume_s": first_resumed.wall_s - ready_resumed.wall_s,
        "resume_cpu_s": sum(first_resumed.cpu_s.values()) - sum(ready_resumed.cpu_s.values()),
        "peak_mb": run.peak_mb,
        "load": run.load,
        "samples": samples, "distinct": epoch.data["distinct"], "expected": expected,
        "image_bytes": epoch.data["image_bytes"],
        "order": epoch.data["order"], "order_again": epoch_again.data["order"],
        "order_of_second_half": epoch.data["order_of_second_half"], "resumed_order": epoch_resumed.data["order"],
    }  # fmt: skip


def _cpu_ms(begin: Any, end: Any, samples: int) -> float:
    return 1e3 * (sum(end.cpu_s.values()) - sum(begin.cpu_s.values())) / samples


if __name__ == "__main__":
    main()
