"""How long a loader takes from the start of its process to the first micro-batch at a client that waits, and its memory.

    python tests/benchmarks/first_piece.py [--rows 1000000] [--rounds 3] [--folder build/bench]

A JSONL of small conversations, prepared before (that takes minutes the first time: packing needs every conversation's tokens);
`data.packing` false and true, one worker (threads in the front) and two (processes). The client is a rank's `Feed`, whose imports
are done, trying to connect when the loader's process is started. CPU is that of all the loader's processes up to the first
micro-batch; memory is the peak resident set of each process after 200 micro-batches, pages of mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT), str(ROOT / "proto")]

from chat_scan import write_rows  # noqa: E402 - found through the line above
from loader_cost import environment, run_tool  # noqa: E402

from stoker_proto.config import Config  # noqa: E402
from stoker_proto.config.reader import load_config  # noqa: E402
from tests.proto.conftest import write_chat_folder  # noqa: E402
from tests.proto.text.chat_templates import CHATML, plain  # noqa: E402
from trainer.feed.feed import Feed  # noqa: E402

BATCHES = 200


def main() -> None:
    """Make the data, run all rounds, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="conversations; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="medians are shown; default: %(default)s")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench", help="where data is made and kept")
    arguments = parser.parse_args()
    folder = (arguments.folder / f"first-piece-{arguments.rows}").resolve()
    shard = folder / "train.jsonl"
    if not shard.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(shard, arguments.rows)
    model = write_chat_folder(folder / "model", plain(CHATML))
    print(f"{'packing':9}{'workers':>8}{'first batch s':>15}{'CPU s until then':>18}   peak MB of each process")
    for packing in (False, True):
        for workers in (1, 2):
            config = write_config(folder, model, shard, packing, workers)
            run_tool("loader_service.cli", "prepare", "--config", str(config))
            runs = [measure(config) for _ in range(arguments.rounds)]
            first, cpu = (statistics.median(run[name] for run in runs) for name in ("first_s", "cpu_s"))
            peaks = max((run["peak_mb"] for run in runs), key=max)
            spread = f"({min(run['first_s'] for run in runs):.2f}-{max(run['first_s'] for run in runs):.2f})"
            print(
                f"{json.dumps(packing):9}{workers:>8}{first:>8.2f} {spread}{cpu:>12.2f}        "
                f"{', '.join(map(str, peaks))}",
                flush=True,
            )


def write_config(folder: Path, model: Path, shard: Path, packing: bool, workers: int) -> Path:
    """The YAML of a run, its address with a port that was free just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tree = {
        "cluster": {"loader_addresses": [f"tcp://127.0.0.1:{port}"]},
        "model": {"base_model_path": str(model)},
        "data": {"dataset_type": "chat", "train_data_paths": [str(shard)], "max_seq_len": 2048, "packing": packing},
        "loader": {"workers": workers},
        "trainer": {"micro_batch_size": 8, "global_batch_size": 8, "lr": 1e-4},
    }
    path = folder / f"{json.dumps(packing)}-{workers}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def measure(config_file: Path) -> dict[str, Any]:
    """One start."""
    config = load_config(config_file, [])
    feed = Feed(config, "train", 0, 1)
    figures: dict[str, Any] = {}
    waiting = threading.Thread(target=pull, args=(feed, figures), daemon=True)
    waiting.start()
    time.sleep(0.5)  # it tries to connect
    started = time.monotonic()
    loader = start(config_file, config)
    figures["process"] = psutil.Process(loader.pid)
    try:
        waiting.join(120)
        if "error" in figures or waiting.is_alive():
            raise SystemExit(f"no first micro-batch: {figures.get('error')}")
        figures["first_s"] = figures["first_at"] - started
        processes = [figures["process"], *figures["process"].children(recursive=True)]
        figures["peak_mb"] = [peak_mb(process.pid) for process in processes]
        return figures
    finally:
        feed.close()
        loader.send_signal(signal.SIGTERM)
        loader.wait(30)


def start(config_file: Path, config: Config) -> subprocess.Popen[bytes]:
    """`loader-serve`."""
    command = [sys.executable, "-m", "loader_service.cli", "serve", "--config", str(config_file), "--bind"]
    return subprocess.Popen(
        [*command, config.cluster.loader_addresses[0]], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL
    )


def pull(feed: Feed, figures: dict[str, Any]) -> None:
    """The client's thread: a few batches, and when the first of them came."""
    try:
        feed.connect(0)
        for number, _ in enumerate(feed.steps(0, 0)):
            if number == 0:
                figures["first_at"] = time.monotonic()
                process = figures["process"]
                times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
                figures["cpu_s"] = sum(each.user + each.system for each in times)
            if number + 1 == BATCHES:
                return
    except Exception as error:  # noqa: BLE001 - the thread's edge: `measure` raises it
        figures["error"] = error


def peak_mb(pid: int) -> int:
    """Highest resident set so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024 // 10**6


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
