"""`make bench`: what a sample costs a loader, beside a hand-tuned pipeline of the same libraries and a plain DataLoader.

On the same files and machine, in interleaved rounds; CPU time counts, since wall time on a shared machine says little.

    python tests/benchmarks/loader_cost.py [--trajectories 64] [--rounds 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE))

from synthetic import write_trajectories  # noqa: E402 - found through the line above

LENGTH, SIZE = 50, 256


def main() -> None:
    """Make the data, run all rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=64, help="of 50 frames of 256x256; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved; medians are shown; default: %(default)s")
    parser.add_argument("--loaders", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench", help="where data is made and kept")
    parser.add_argument("--transport", default="base64", choices=["base64", "jpeg", "pixels"])
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    model = arguments.folder / "model"
    if not model.exists():
        run_tool("trainer.models.tiny", "--family", "llava", "--image-size", str(SIZE), "--out", str(model))
    results: dict[str, Any] = {}
    for kind in ("deflated", "stored"):
        folder = arguments.folder / f"{kind}-{arguments.trajectories}"
        jsonl = folder / "train.jsonl"
        if not jsonl.exists():
            write_trajectories(
                folder, num=arguments.trajectories, length=LENGTH, size=SIZE, deflated=kind == "deflated"
            )
        config = write_config(folder, model, jsonl, arguments.transport)
        run_tool("loader_service.cli", "prepare", "--config", str(config))
        results[kind] = measure(kind, config, jsonl, arguments)
    print(table(results, arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def measure(kind: str, config: Path, jsonl: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians over interleaved rounds of the straight pipeline and of the loaders with a null trainer."""
    straight, stoker, filling, second = [], [], [], []
    disk = config.parent / "encoded"
    for _ in range(arguments.rounds):
        straight.append(run_json(str(HERE / "pipelines.py"), "straight", str(jsonl)))
        with loaders(config, arguments.loaders) as addresses:
            stoker.append(bench(config, addresses))
        shutil.rmtree(disk, ignore_errors=True)
        kept = "loader.disk_cache_gb=4", f"loader.disk_cache_dir={disk}"
        for runs in (filling, second):  # the second in new processes; what the first wrote is in the page cache
            with loaders(config, arguments.loaders, *kept) as addresses:
                runs.append(bench(config, addresses))
    with loaders(config, arguments.loaders) as addresses:  # asked from mid-epoch on: the first batch after a resume
        total = arguments.trajectories * LENGTH
        resumed = bench(config, addresses, "--start-sample", str(total // 64 * 32), "--batches", "20")
    rate = statistics.median(run["samples_per_s"] for run in stoker)
    with loaders(config, arguments.loaders) as addresses:  # a trainer that needs 70% of what the loaders can give
        step_ms = 1e3 * 32 / (0.7 * rate)
        paced = bench(config, addresses, "--step-time-ms", f"{step_ms:.1f}")
    result = {
        "straight_cpu_ms": statistics.median(run["cpu_ms_per_sample"] for run in straight),
        "loader_cpu_ms": statistics.median(run["loader_cpu_ms_per_sample"] for run in stoker),
        "filling_cpu_ms": statistics.median(run["loader_cpu_ms_per_sample"] for run in filling),
        "second_run_cpu_ms": statistics.median(run["loader_cpu_ms_per_sample"] for run in second),
        "second_run_range_ms": [pick(run["loader_cpu_ms_per_sample"] for run in second) for pick in (min, max)],
        "second_run_decoded_per_record": max(run["records_decoded_per_record"] for run in second),
        "client_cpu_ms": statistics.median(run["client_cpu_ms_per_sample"] for run in stoker),
        "records_decoded_per_record": max(run["records_decoded_per_record"] for run in stoker),
        "first_batch_s": max(run["first_batch_s"] for run in stoker),
        "first_batch_resumed_s": resumed["first_batch_s"],
        "samples_per_s": rate,
        "wire_bytes_per_sample": stoker[0]["wire_bytes_per_sample"],
        "paced_step_ms": step_ms,
        "paced_data_wait_frac": paced["data_wait_frac"],
        "same_digest": len({run["digest"] for run in [*stoker, *filling, *second, paced]}) == 1,
    }
    if kind == "deflated":
        naive = run_json(str(HERE / "pipelines.py"), "naive", str(jsonl), "--samples", "256")
        result["naive_cpu_ms"] = naive["cpu_ms_per_sample"]
    return result


def table(results: dict[str, Any], arguments: argparse.Namespace) -> str:
    """The figures, and the ratios that count."""
    lines = [
        f"{arguments.trajectories} trajectories of {LENGTH} frames {SIZE}x{SIZE}, JPEG q95, {arguments.transport}, "
        f"{arguments.loaders} loader(s), {os.cpu_count()} cores, medians of {arguments.rounds} interleaved rounds"
    ]
    for kind, figures in results.items():
        lines.append(
            f"{kind:9} straight {figures['straight_cpu_ms']:.3f} | loader {figures['loader_cpu_ms']:.3f} CPU ms/sample "
            f"= {figures['loader_cpu_ms'] / figures['straight_cpu_ms']:.2f}x | client {figures['client_cpu_ms']:.3f} | "
            f"decoded/record {figures['records_decoded_per_record']:.3f} | first batch {figures['first_batch_s']:.2f} s, "
            f"resumed {figures['first_batch_resumed_s']:.2f} s | {figures['samples_per_s']:.0f}/s | "
            f"data wait at 70% load {100 * figures['paced_data_wait_frac']:.2f}%"
        )
        low, high = figures["second_run_range_ms"]
        lines.append(
            f"{'':9} loader.disk_cache_gb: first run {figures['filling_cpu_ms']:.3f}, second run "
            f"{figures['second_run_cpu_ms']:.3f} ({low:.3f} to {high:.3f}) CPU ms/sample, from the page cache | decoded/record "
            f"{figures['second_run_decoded_per_record']:.3f} | same digests {figures['same_digest']}"
        )
        if "naive_cpu_ms" in figures:
            ratio = figures["naive_cpu_ms"] / figures["loader_cpu_ms"]
            lines.append(
                f"{'':9} NPZ opened per sample in a DataLoader: {figures['naive_cpu_ms']:.1f} = {ratio:.0f}x the loader"
            )
    return "\n".join(lines)


def write_config(folder: Path, model: Path, jsonl: Path, transport: str) -> Path:
    """The YAML of a run over the synthetic data."""
    config = {
        "model": {"base_model_path": str(model)},
        "data": {
            "dataset_type": "mani_openpi",
            "train_data_paths": [str(jsonl)],
            "max_seq_len": 1024,
            "action": {"codec": "bins"},
            "image": {"transport": transport},
        },
        "trainer": {"micro_batch_size": 32, "global_batch_size": 32, "lr": 1e-4},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@contextmanager
def loaders(config: Path, count: int, *settings: str) -> Iterator[list[str]]:
    """`count` real loader-serve processes, ended by SIGTERM. settings: as after `--set`."""
    command = [
        sys.executable,
        "-m",
        "loader_service.cli",
        "serve",
        "--config",
        str(config),
        "--bind",
        "tcp://127.0.0.1:*",
        *(part for setting in settings for part in ("--set", setting)),
    ]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    try:
        lines = [process.stdout.readline() for process in processes if process.stdout]
        if not all(line.startswith("loader-serve ready") for line in lines):
            raise SystemExit(f"a loader did not start: {lines}")
        yield [line.split()[2] for line in lines]
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.communicate(timeout=30)


def bench(config: Path, addresses: list[str], *options: str) -> dict[str, Any]:
    """One loader-bench run."""
    connect = [part for address in addresses for part in ("--connect", address)]
    return run_json("-m", "trainer.bench.command", "--config", str(config), *connect, "--json", *options)


def run_json(*command: str) -> dict[str, Any]:
    """Run a Python program and read its last line."""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run_tool(module: str, *options: str) -> None:
    """Run `python -m module` and end if it fails."""
    subprocess.run(
        [sys.executable, "-m", module, *options], cwd=ROOT, env=environment(), check=True, stdout=subprocess.DEVNULL
    )


def environment() -> dict[str, str]:
    """Found also where the package is not installed; single-threaded numeric libraries, as in production."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'proto'}", "OMP_NUM_THREADS": "1"}


if __name__ == "__main__":
    main()
