"""CPU seconds of every process of a run on one node until its first step, and until its `--steps`-th.

The run is `deploy/launch.py` with a config, `deploy/configs/demo.yaml` for example, whose model and data are made (`make demo`).
Processes are those below the launcher, by what they are: launcher, loaders, DeepSpeed's, ranks. A rank has ended a step when its
line stands in the log of digests. `--against FOLDER` measures another checkout in turns with this one; each reads the config and
what it names in its own folder. With `--unprepared` each run prepares its data first.

    python tests/benchmarks/start_up.py --config deploy/configs/demo.yaml [--rounds 3] [--steps 40] [--unprepared]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
_DEADLINE_S = 600.0
_KINDS = (
    ("deepspeed.launcher", "deepspeed"),
    ("trainer/main.py", "ranks"),
    ("loader_service", "loaders"),
    ("deploy/launch.py", "launcher"),
)
"""What a command line contains -> what the process is. DeepSpeed's have the script's name too, and come first."""


def main() -> None:
    """Run all rounds, print medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=v")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1, help="steps after which a run is stopped; default: %(default)s")
    parser.add_argument("--against", type=Path, help="another checkout, for a comparison")
    parser.add_argument("--unprepared", action="store_true", help="an empty data.cache_dir for each run")
    arguments = parser.parse_args()
    trees = [ROOT, *([arguments.against.resolve()] if arguments.against else [])]
    found: dict[tuple[Path, int], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for tree in trees:
            for step, figures in run(tree, arguments).items():
                found.setdefault((tree, step), []).append(figures)
                print(f"{tree} step {step}: {figures['wall']:.1f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(f"CPU s by kind of process, medians (ranges) of {arguments.rounds} rounds; {os.cpu_count()} cores")
    for (tree, step), rounds in found.items():
        cells = [f"{kind} {shown([one.get(kind, 0.0) for one in rounds])}" for kind in sorted(rounds[0])]
        print(f"{tree} step {step}: {', '.join(cells)}")


def shown(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def run(tree: Path, arguments: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Step (1, and the last) -> CPU seconds by kind, of the slowest rank, and `wall`. The run is stopped then."""
    with tempfile.TemporaryDirectory() as folder:
        options = [part for value in arguments.set for part in ("--set", value)]
        command = [sys.executable, str(tree / "deploy" / "launch.py"), "--config", str(arguments.config), *options]
        command += ["--set", f"trainer.output_dir={folder}"]
        if arguments.unprepared:
            command += ["--set", f"data.cache_dir={folder}/manifests"]
        log, began = Path(folder) / "digests-rank0.jsonl", time.monotonic()
        environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'proto'}"}
        process = psutil.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL)
        figures: dict[int, dict[str, float]] = {}
        try:
            for step in sorted({1, arguments.steps}):
                while not (log.exists() and log.read_bytes().count(b"\n") >= step):
                    if process.poll() is not None or time.monotonic() > began + _DEADLINE_S:
                        raise SystemExit(f"{tree}: no step {step}: the run ended, or took too long")
                    time.sleep(0.05)
                figures[step] = {**cpu_by_kind(process), "wall": time.monotonic() - began}
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(timeout=120)
        return figures


def cpu_by_kind(process: psutil.Process) -> dict[str, float]:
    """CPU seconds of the process and all below it, those that have ended included; `slowest rank` beside the sums."""
    seconds: Counter[str] = Counter()
    for one in [process, *process.children(recursive=True)]:
        try:
            line, times = " ".join(one.cmdline()), one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        kind = next((kind for mark, kind in _KINDS if mark in line), "other")
        used = times.user + times.system + times.children_user + times.children_system
        seconds[kind] += used
        if kind == "ranks":
            seconds["slowest rank"] = max(seconds["slowest rank"], used)
    return dict(seconds)


if __name__ == "__main__":
    main()
