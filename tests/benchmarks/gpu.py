"""`make bench-gpu`: what this trainer does on one GPU, in under 8 minutes; installs nothing. Never run on a GPU so far.

    python tests/benchmarks/gpu.py [--tiny] [--only PART ...] [--json FILE]

Parts, each in a process of its own (`gpu_parts.py`):

    cpu-fp32, fp32, bf16      5 steps of small models of four families: GPU against CPU
    cached                    300 steps of a VLM of 0.5 B from one batch that stays on the GPU; then a profile of 3 steps
    loaders-1, loaders-2      the same model and size of batch from 1 and 2 loaders: step time over `cached`, data wait
    lora-7b                   LoRA on a 7 B shape
    zero3                     full ZeRO-3 of 1.35 B with a checkpoint, a resume and an export
    full-7b                   all weights of a 7 B shape: figures of the step only

--tiny: everything small, also on a CPU, so that the script itself is tried where there is no GPU. On a GPU the figures go to
tests/benchmarks/results/, with versions and conditions. A part that fails or has no time left is named there with the reason, and
the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT_S = 460.0
"""For all parts together."""
PARTS: dict[str, float] = {
    "cpu-fp32": 90, "fp32": 90, "bf16": 90, "cached": 120, "loaders-1": 110, "loaders-2": 110, "lora-7b": 80, "zero3": 120,
    "full-7b": 90,
}  # fmt: skip
"""Part -> most seconds for it."""
LARGEST = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest difference from the CPU's fp32, as a share, of losses and norms of gradients."""
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "tokenizers", "numpy", "pyzmq", "peft", "flash-attn")


def main() -> int:
    """Run the parts; print and perhaps write the figures. Returns the exit code."""
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # what runs ends with this
    began, results, failures = time.monotonic(), dict[str, Any](), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        for part in arguments.only or PARTS:
            left = LIMIT_S - (time.monotonic() - began) if not arguments.tiny else 3600.0
            if left < 20:
                failures[part] = "no time was left"
                continue
            started = time.monotonic()
            found = run_part(part, Path(folder), min(left, PARTS[part]) if not arguments.tiny else left, arguments.tiny)
            print(f"{part}: {time.monotonic() - started:.0f} s", file=sys.stderr)
            if isinstance(found, str):
                failures[part] = found
            else:
                results[part] = found
    judge(results, failures)
    report = {"conditions": conditions(arguments.tiny), "results": results, "failures": failures}
    report["conditions"]["seconds"] = round(time.monotonic() - began)
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="")
    device = results.get("cached", next(iter(results.values()), {})).get("device", "cpu")
    file = arguments.json
    if file is None and device != "cpu" and not arguments.tiny:
        name = device.lower().replace(" ", "-")
        file = HERE / "results" / f"gpu-{name}-{time.strftime('%Y%m%d-%H%M', time.gmtime())}.json"
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return 1 if failures else 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes, also on a CPU; writes no result but with --json"
    )
    parser.add_argument("--only", action="append", choices=list(PARTS), help="a part; repeatable; default: all")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser.parse_args()


def run_part(part: str, folder: Path, limit_s: float, tiny: bool) -> dict[str, Any] | str:
    """The part's figures, or why there are none."""
    out = folder / f"{part}.json"
    command = [sys.executable, str(HERE / "gpu_parts.py"), part, "--folder", str(folder), "--out", str(out)]
    more = {"CUDA_VISIBLE_DEVICES": ""} if part == "cpu-fp32" else {}
    # In a session of its own: the part's loaders end with it, also when it is killed at its limit.
    process = subprocess.Popen(
        [*command, *(["--tiny"] if tiny else [])],
        env=environment(**more),
        cwd=ROOT,
        stdout=sys.stderr,
        start_new_session=True,
    )
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return f"not done after {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code != 0 or not out.exists():
        return f"exit code {code}: see the messages above"
    found: dict[str, Any] = json.loads(out.read_text())
    return str(found["skipped"]) if "skipped" in found else found


def environment(**more: str) -> dict[str, str]:
    """Of the parts: Stoker from this checkout, before whatever else is on the path."""
    paths = [str(ROOT), str(ROOT / "proto"), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | more


def judge(results: dict[str, Any], failures: dict[str, str]) -> None:
    """Add what follows from several parts, and what is out of bounds."""
    reference = results.get("cpu-fp32")
    for precision, largest in LARGEST.items():
        if reference is None or precision not in results:
            continue
        found = results[precision]
        shares = {
            family: max(abs(a - b) / abs(b) for a, b in zip(values, reference["figures"][family], strict=True))
            for family, values in found["figures"].items()
        }
        found["difference_from_cpu"] = shares
        if max(shares.values()) > largest:
            failures[precision] = f"losses or norms differ from the CPU's by up to {max(shares.values()):.3g}"
    cached = results.get("cached")
    for part in ("loaders-1", "loaders-2"):
        if cached is not None and part in results:
            results[part]["step_ratio"] = results[part]["median_step_s"] / cached["median_step_s"]


def conditions(tiny: bool) -> Mapping[str, Any]:
    """Versions and machine."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "tiny": tiny,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": commit.stdout.strip() or "unknown",
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())
