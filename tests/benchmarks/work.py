"""What a sample costs in work that knows no clock: Python calls, bytecodes, allocations, decodes, copies.

    python tests/benchmarks/work.py             # compare with tests/benchmarks/work.json; exit 1 if a figure is 3% worse
    python tests/benchmarks/work.py --renew     # write the figures there, after a change that is worth its work

    robot-encode    a record of the shipped demonstrations -> encoded samples
    robot-stored    the same records from the cache on disk
    robot-tokenise  of these, instruction and action -> row          chat-tokenise   dialogues -> rows
    robot-pack      encoded samples -> frames of pieces              packed-pack     the same, several dialogues in a row
    robot-client    frames -> micro-batches                          packed-client
    robot-epoch     tickets of an epoch through a PieceBuilder

Calls and bytecodes are equal in each run, on each machine of one kind with the same versions; memory differs by less than 1%. A
figure that sinks passes: renew the baseline, so that it cannot rise again unseen. `instructions.py` counts what the libraries do
too; it needs valgrind.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "proto")]
BASELINE = Path(__file__).with_name("work.json")
TOLERANCE = 0.03
LIBRARIES = ("numpy", "tokenizers", "msgpack", "orjson", "simplejpeg", "pybase64", "deflate", "cykooz-resizer", "pyzmq")
"""Whose versions decide how much work there is."""
PARTS = (
    *("robot-encode", "robot-stored", "robot-tokenise", "robot-pack", "robot-client", "robot-epoch"),
    *("chat-tokenise", "packed-pack", "packed-client"),
)
Figures = Mapping[str, Mapping[str, float]]
"""Part -> figure -> value."""


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    return found | {name: version(name) for name in LIBRARIES}


def worse(figures: Figures, baseline: Figures) -> list[str]:
    """A line for each figure that is more than 3% above the baseline, or that is on one side only."""
    lines = []
    names = {(part, name) for side in (figures, baseline) for part in side for name in side[part]}
    for part, name in sorted(names):
        now, before = figures.get(part, {}).get(name), baseline.get(part, {}).get(name)
        if now is None or before is None:
            lines.append(f"{part} {name}: {before} before, {now} now: renew the baseline")
        elif now > before * (1 + TOLERANCE):
            change = f"{100 * (now / before - 1):+.1f}%" if before else "from nothing"
            lines.append(f"{part} {name}: {before:,.2f} before, {now:,.2f} now ({change}; at most +3%)")
    return lines


def count_work(do: Callable[[], Any], samples: int) -> dict[str, float]:
    """Figures of `do()`, per sample. It runs once before, so that caches are filled."""
    do()
    gc.collect()
    gc.disable()
    try:
        calls, library_calls = _count_calls(do)
        bytecodes = _count_bytecodes(do)
        kept, peak = _count_memory(do)
    finally:
        gc.enable()
    found = {"python_calls": calls, "library_calls": library_calls, "bytecodes": bytecodes}
    if kept is not None:
        found["allocations_kept"] = kept
    return {name: value / samples for name, value in found.items()} | {"peak_bytes": peak / samples}


def _count_calls(do: Callable[[], Any]) -> tuple[int, int]:
    """(calls of Python functions, calls of functions in C)."""
    counts = {"call": 0, "c_call": 0}

    def profile(_frame: FrameType, event: str, _argument: Any) -> None:
        if event in counts:
            counts[event] += 1

    sys.setprofile(profile)
    try:
        do()
    finally:
        sys.setprofile(None)
    return counts["call"], counts["c_call"] - 1  # the last one is setprofile's own


def _count_bytecodes(do: Callable[[], Any]) -> int:
    count = 0

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(None)
    return count


def _count_memory(do: Callable[[], Any]) -> tuple[int | None, int]:
    """(allocations that its result keeps, None without a result; most bytes at once)."""
    tracemalloc.start()
    try:
        result = do()
        _, peak = tracemalloc.get_traced_memory()
        kept = None if result is None else len(tracemalloc.take_snapshot().traces)
        del result
    finally:
        tracemalloc.stop()
    return kept, peak


def copies(do: Callable[[], Any], payload_bytes: int) -> float:
    """Most bytes at once during `do()`, its result included, in units of the payload."""
    return _count_memory(do)[1] / payload_bytes


def measure(folder: Path) -> dict[str, dict[str, float]]:
    """All figures."""
    from tests.benchmarks.parts import Parts, write_inputs

    write_inputs(folder)
    figures: dict[str, dict[str, float]] = {}
    for data in ("robot", "chat", "packed"):
        parts = Parts(folder, data)
        records = parts.encode()
        frames = parts.pack(records)
        largest = max(range(len(frames)), key=lambda number: len(frames[number]))
        every: dict[str, Callable[[], Any]] = {
            "encode": parts.encode,
            "tokenise": parts.tokenise,
            "pack": lambda parts=parts, records=records: parts.pack(records),
            "client": lambda parts=parts, frames=frames: parts.batches(frames),
        }
        for name, do in every.items():
            if f"{data}-{name}" in PARTS:
                figures[f"{data}-{name}"] = count_work(do, parts.num_samples)
        ticket = parts.tickets()[largest]
        size = len(frames[largest])
        for name, do in {
            "pack": lambda parts=parts, records=records, ticket=ticket: parts.pack_one(ticket, records),
            "client": lambda parts=parts, frame=frames[largest]: parts.batches([frame]),
        }.items():
            if f"{data}-{name}" in PARTS:
                do()
                figures[f"{data}-{name}"]["copies_per_piece"] = copies(do, size)
        if data == "robot":
            keeping = parts.keeping(folder / "encoded")
            figures["robot-stored"] = count_work(
                lambda parts=parts, keeping=keeping: keeping.encode_all(parts.places, 0), parts.num_samples
            )
            if keeping.disk.counters.hits != 4 * parts.manifest.num_records:
                raise SystemExit("records that were kept on disk were not found there")
            keeping.disk.close()
            figures["robot-epoch"] = epoch(parts)
    return figures


def epoch(parts: Any) -> dict[str, float]:
    """Records decoded per record, in an epoch of tickets."""
    from loader_service.pieces.builder import PieceBuilder
    from loader_service.pieces.encoder import RecordEncoder

    done = threading.Semaphore(0)
    builder = PieceBuilder(
        RecordEncoder(parts.config.data, parts.processor), "l", lambda _address, _frame: done.release(),
        threads=1, cache_bytes=1 << 28, read_ahead=True,
    )  # fmt: skip
    try:
        tickets = parts.tickets()
        for ticket in tickets:
            builder.submit(b"", ticket, parts.manifest, parts.plan, 0, lambda: None)
        for _ in tickets:
            if not done.acquire(timeout=120):
                raise SystemExit("a piece was not built within 120 s")
        counters = builder.counters()
    finally:
        builder.close(60)
    if counters.samples != parts.num_samples:
        raise SystemExit(f"{counters.samples} samples were sent, and the epoch has {parts.num_samples}")
    return {"decodes_per_record": counters.records_decoded / parts.manifest.num_records}


def measured() -> Figures:
    """The figures, counted by a process of its own: with a fixed order of sets, one thread, and no caches of others."""
    environment = {**os.environ, "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONTRACEMALLOC", None)
    done = subprocess.run([sys.executable, __file__, "--child"], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"counting ended with {done.returncode}:\n{done.stderr[-3000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> int:
    """Compare, or renew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write the figures to work.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        with tempfile.TemporaryDirectory() as name:
            print(json.dumps(measure(Path(name))))
        return 0
    figures = measured()
    for part, found in figures.items():
        print(f"{part:15}", " | ".join(f"{name} {value:,.2f}" for name, value in found.items()))
    if arguments.renew:
        rounded = {part: {name: round(value, 3) for name, value in found.items()} for part, found in figures.items()}
        BASELINE.write_text(json.dumps({"versions": versions(), "figures": rounded}, indent=1) + "\n")
        return 0
    baseline = json.loads(BASELINE.read_text())
    if baseline["versions"] != versions():
        print(f"not compared: the baseline is of {baseline['versions']}, this is {versions()}")
        return 2
    lines = worse(figures, baseline["figures"])
    print("\n".join(lines) or "no figure is more than 3% worse")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
