"""What `loader-prepare` and single reads cost on conversations, per container; the conversations are small and deterministic.

    python tests/benchmarks/chat_scan.py [--rows 1000000] [--reads 2000] [--folder /tmp] [--containers jsonl,json,parquet]

The scan is all of `loader-prepare` in one process: hashing, finding the rows, writing the manifest; once as it is, and once with
`validate`, which parses and mends every row. Each runs in a process of its own, whose peak memory is that of the libraries too.
Reads are of random records, one by one, as a loader does them. Everything is written below a temporary folder and removed.
"""

from __future__ import annotations

import argparse
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

_ROOT = Path(__file__).parents[2]
_GROUP_ROWS = 1000
_HEADER = (
    *(("MB", 8), ("scan CPU s", 12), ("us/row", 8), ("validate CPU s", 16), ("us/row", 8), ("peak MB", 9)),
    ("read us", 9),
)


def main() -> None:
    """Make the files, measure, print."""
    arguments = _arguments()
    if arguments.measure is not None:
        print(json.dumps(_measure(arguments.measure, arguments.validate, arguments.reads)))
        return
    header = [f"{name:>{width}}" for name, width in _HEADER]
    print(f"{'container':<14}{''.join(header)}")
    for container in arguments.containers.split(","):
        with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="chat-scan-") as name:
            path = Path(name) / f"train.{container}"
            write_rows(path, arguments.rows)
            size = path.stat().st_size
            plain = _in_process(path, False, arguments.reads)
            checked = _in_process(path, True, 0)
        peak = max(plain["peak_bytes"], checked["peak_bytes"])
        print(
            f"{container:<14}{size / 1e6:>8,.0f}{plain['cpu_s']:>12.2f}{plain['cpu_s'] / arguments.rows * 1e6:>8.2f}"
            f"{checked['cpu_s']:>16.2f}{checked['cpu_s'] / arguments.rows * 1e6:>8.2f}{peak / 1e6:>9,.0f}"
            f"{plain['read_us']:>9.1f}",
            flush=True,
        )


def write_rows(path: Path, rows: int) -> None:
    """Conversations of two turns in about 220 bytes of JSON; parquet in row groups of 1,000."""
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.Table.from_pylist([_row(0)]).schema
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(0, rows, _GROUP_ROWS):
                group = [_row(i) for i in range(start, min(start + _GROUP_ROWS, rows))]
                writer.write_table(pa.Table.from_pylist(group, schema))
        return
    import gzip

    import zstandard

    opened: Any = {".gz": gzip.open, ".zst": zstandard.open}.get(path.suffix, open)
    is_array = ".json" in path.suffixes
    with opened(path, "wt") as file:
        for i in range(rows):
            before, after = (("[" if i == 0 else " "), ("]" if i == rows - 1 else ",")) if is_array else ("", "")
            file.write(f"{before}{json.dumps(_row(i))}{after}\n")


def _row(number: int) -> dict[str, Any]:
    question = f'Question {number}: what is {number} plus one, and why is it "so"?'
    answer = f"It is {number + 1}, as one follows the other.\nThat is how counting works."
    return {
        "id": str(number),
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


def _measure(path: Path, validate: bool, reads: int) -> dict[str, Any]:
    from loader_service.prepare.run import ScanOptions, prepare
    from loader_service.sources.base import make_dataset
    from stoker_proto.config.reader import load_config

    config = path.with_name("config.yaml")
    options = f"{{validate: {str(validate).lower()}}}"
    config.write_text(
        "model: {base_model_path: none}\n"
        f"data: {{dataset_type: chat, train_data_paths: ['{path}'], max_seq_len: 64, options: {options}}}\n"
        "trainer: {micro_batch_size: 1, global_batch_size: 1, lr: 1e-4}\n"
    )
    loaded = load_config(config)
    manifest = prepare(loaded, scan=ScanOptions(processes=1)).entries["train"][0]
    cpu_s, peak_bytes = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    dataset = make_dataset(loaded.data)
    records = np.random.default_rng(0).integers(0, manifest.num_records, reads)
    begun = time.process_time()
    for record in records:
        for _ in dataset.read(Path(manifest.shards[0]), int(manifest.offsets[record]), int(manifest.sizes[record])):
            pass
    read_us = (time.process_time() - begun) / max(reads, 1) * 1e6
    return {"records": manifest.num_records, "cpu_s": cpu_s, "peak_bytes": peak_bytes, "read_us": read_us}


def _in_process(path: Path, validate: bool, reads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", str(path), "--reads", str(reads)]
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "proto")])
    done = subprocess.run(
        command + ["--validate"] * validate, check=True, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths}
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--reads", type=int, default=2000, help="random records that are read one by one")
    parser.add_argument("--containers", default="jsonl,json,jsonl.gz,jsonl.zst,parquet")
    parser.add_argument("--folder", help="for the temporary files; default: the system's")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--validate", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
