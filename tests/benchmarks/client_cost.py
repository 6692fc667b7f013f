"""What a sample costs a rank, from the socket to the uint8 batch, for each `data.image.transport`.

The rank is `loader-bench`; its loaders answer from memory. Rounds are interleaved. `--against FOLDER` measures another checkout
of Stoker in the same rounds, with the same loaders. Beside each figure stands the cost of decoding such images alone, measured in
the same round: a busy machine makes both larger.

    python tests/benchmarks/client_cost.py [--rounds 7] [--against FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from loader_cost import LENGTH, ROOT, SIZE, loaders, run_tool, write_config
from synthetic import write_trajectories

TRANSPORTS = ("base64", "jpeg", "pixels")
DECODE_ALONE = """
import json, sys
from stoker_proto.config import ImageConfig
from stoker_proto.images.spec import ImageSpec
from stoker_proto.images.transport_cost import measure
spec = ImageSpec(family="llava", height=256, width=256, steps=(), resample="bicubic", rescale=1 / 255, mean=(0.5,) * 3,
                 std=(0.5,) * 3, num_tokens=1, token="<image>", token_id=1)
print(json.dumps({name: cost[1] for name, cost in measure(ImageConfig(), spec).items()}))
"""


def main() -> None:
    """Make the data, run all rounds, print medians and ranges."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=64, help="of 50 frames of 256x256; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved; default: %(default)s")
    parser.add_argument("--against", type=Path, help="another checkout, for a comparison")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/bench", help="where data is made and kept")
    arguments = parser.parse_args()
    trees = [ROOT, *([arguments.against.resolve()] if arguments.against else [])]
    costs: dict[tuple[str, Path], list[float]] = {(name, tree): [] for name in TRANSPORTS for tree in trees}
    alone: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
    with ExitStack() as stack:
        configs = {name: make_config(arguments.folder, arguments.trajectories, name) for name in TRANSPORTS}
        addresses = {name: stack.enter_context(loaders(config, 1)) for name, config in configs.items()}
        for name in TRANSPORTS:
            pull(ROOT, configs[name], addresses[name])  # from now on the loader has its records in memory
        for _ in range(arguments.rounds):
            for name, cost in json.loads(python(ROOT, "-c", DECODE_ALONE)).items():
                alone[name].append(cost)
            for name, tree in costs:
                costs[name, tree].append(pull(tree, configs[name], addresses[name]))
    print(
        f"CPU ms per sample of a rank: median (range) of {arguments.rounds} interleaved rounds; {os.cpu_count()} cores"
    )
    for name, tree in costs:
        here = "" if tree == ROOT else f"  {tree}"
        print(f"{name:8} {shown(costs[name, tree])}   decoding alone {shown(alone[name])}{here}")


def shown(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def make_config(folder: Path, trajectories: int, transport: str) -> Path:
    """The YAML of one transport over stored NPZ; its own folder, for its own manifest."""
    model, data = folder / "model", folder / f"stored-{trajectories}"
    if not model.exists():
        run_tool("trainer.models.tiny", "--family", "llava", "--image-size", str(SIZE), "--out", str(model))
    if not (data / "train.jsonl").exists():
        write_trajectories(data, num=trajectories, length=LENGTH, size=SIZE, deflated=False)
    own = folder / f"client-{transport}"
    own.mkdir(parents=True, exist_ok=True)
    return write_config(own, model, data / "train.jsonl", transport)


def pull(tree: Path, config: Path, addresses: list[str]) -> float:
    """CPU ms per sample of one epoch of a checkout's rank."""
    connect = [part for address in addresses for part in ("--connect", address)]
    answer = python(tree, "-m", "trainer.bench.command", "--config", str(config), *connect, "--json")
    return float(json.loads(answer.splitlines()[-1])["client_cpu_ms_per_sample"])


def python(tree: Path, *command: str) -> str:
    """What a program of a checkout prints."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'proto'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
