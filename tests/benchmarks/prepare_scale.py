"""What `loader-prepare` costs per trajectory, on a synthetic JSONL, and what that means for 4.5 million.

    python tests/benchmarks/prepare_scale.py [--rows 100000] [--actions 80] [--processes 1] [--folder /tmp]

The rows are deterministic: actions of 6 decimals, as the collector writes them. Each row has a small NPZ, of which the scan reads
the directory (a real one is larger, and no more of it is read). The page cache holds them: a network disk takes longer. Every
measurement runs in a process of its own. Memory per trajectory is a slope: the peak of ten times as many trajectories of one
action, less the peak of twice as many, by their difference; so the interpreter, the libraries and the bounded buffers do not
count.
Everything is written below a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

TARGET_ROWS = 4_500_000
_ROOT = Path(__file__).parents[2]


def main() -> None:
    """Make the files, measure, print."""
    arguments = _arguments()
    if arguments.measure is not None:
        print(json.dumps(_measure(arguments.measure, arguments.processes)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="prepare-scale-") as name:
        large = Path(name) / "large"
        write_rows(large / "train.jsonl", arguments.rows, arguments.actions)
        size = (large / "train.jsonl").stat().st_size
        cold = _in_process(large, arguments.processes)
        warm = _in_process(large, arguments.processes)
        os.utime(large / "train.jsonl")
        touched = _in_process(large, arguments.processes)
        short = []
        for multiple in (2, 10):
            folder = Path(name) / f"short-{multiple}"
            write_rows(folder / "train.jsonl", multiple * arguments.rows, 1)
            short.append(_in_process(folder, arguments.processes))
    factor = TARGET_ROWS / arguments.rows
    memory, cache = ((short[1][key] - short[0][key]) / (8 * arguments.rows) for key in ("peak_bytes", "cache_bytes"))
    table = [
        ("rows x actions", f"{arguments.rows:,} x {arguments.actions}", f"{TARGET_ROWS:,}"),
        ("JSONL", f"{size / 1e6:,.0f} MB", f"{size * factor / 1e9:,.1f} GB"),
        ("scan, CPU s", f"{cold['cpu_s']:.1f}", f"{cold['cpu_s'] * factor:,.0f}"),
        ("CPU us per trajectory", f"{cold['cpu_s'] / arguments.rows * 1e6:.0f}", ""),
        (f"scan, wall s ({arguments.processes} processes)", f"{cold['wall_s']:.1f}", f"{cold['wall_s'] * factor:,.0f}"),
        ("again, nothing changed, s", f"{warm['wall_s']:.3f}", ""),
        ("again, touched: hashed only, CPU s", f"{touched['cpu_s']:.2f}", f"{touched['cpu_s'] * factor:,.0f}"),
        ("peak memory of the scan, MB", f"{cold['peak_bytes'] / 1e6:,.0f}", ""),
        ("memory per trajectory, bytes", f"{memory:.1f}", f"{memory * TARGET_ROWS / 1e6:,.0f} MB"),
        ("cache on disk per trajectory, bytes", f"{cache:.1f}", f"{cache * TARGET_ROWS / 1e6:,.0f} MB"),
    ]
    print(f"{'':<38}{'measured':>18}{'extrapolated':>18}")
    for label, measured, extrapolated in table:
        print(f"{label:<38}{measured:>18}{extrapolated:>18}")


def write_rows(path: Path, rows: int, num_actions: int) -> None:
    """rows trajectories of num_actions actions float[7]; 64 different ones in turn, so that writing is quick."""
    path.parent.mkdir(parents=True)
    random = np.random.default_rng(0)
    npz = io.BytesIO()
    np.savez(npz, rgb=np.zeros((num_actions, 1, 1, 3), np.uint8))
    texts = [json.dumps(random.uniform(-1, 1, (num_actions, 7)).round(6).tolist()) for _ in range(64)]
    with path.open("w") as file:
        for row in range(rows):
            frames = path.parent / f"traj_{row:06d}" / "obs.npz"
            frames.parent.mkdir()
            frames.write_bytes(npz.getvalue())
            file.write(
                f'{{"obs_path": "traj_{row:06d}/obs.npz", "task": "PickCube-v1", "actions": {texts[row % len(texts)]}}}\n'
            )


def _measure(folder: Path, processes: int) -> dict[str, Any]:
    from loader_service.prepare.run import ScanOptions, prepare
    from stoker_proto.config.reader import load_config

    config = folder / "config.yaml"
    config.write_text(
        f"model: {{base_model_path: none}}\n"
        f"data: {{dataset_type: mani_openpi, train_data_paths: ['{folder}/train.jsonl'], max_seq_len: 64}}\n"
        "trainer: {micro_batch_size: 1, global_batch_size: 1, lr: 1e-4}\n"
    )
    loaded = load_config(config)
    start = time.perf_counter()
    prepared = prepare(loaded, scan=ScanOptions(processes=processes))
    wall_s = time.perf_counter() - start
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "records": prepared.entries["train"][0].num_records,
        "wall_s": wall_s,
        "cpu_s": sum(one.ru_utime + one.ru_stime for one in usage),
        "peak_bytes": sum(one.ru_maxrss for one in usage) * 1024,
        "cache_bytes": sum(file.stat().st_size for file in (folder / ".stoker").rglob("*") if file.is_file()),
    }


def _in_process(folder: Path, processes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(folder), "--processes", str(processes)]
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "proto")])
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths})
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--actions", type=int, default=80, help="actions per row")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--folder", help="for the temporary files; default: the system's")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
