"""What it costs a rank to open any position of an epoch of 360 million samples: `python tests/benchmarks/order_position.py`.

Also what an epoch's order takes in memory: one array of lane lengths, nothing per sample.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "proto"))

from stoker_proto.order.lanes import Order

SAMPLES, MICRO_BATCH, CELL = 360_000_000, 32, 8


def main() -> None:
    """Print the time of `Order.runs` at random positions, for equal and for unequal lanes."""
    rng = random.Random(0)
    for lanes in (32, 320, 3200):
        for equal in (True, False):
            lengths = np.full(lanes, SAMPLES // lanes) + (0 if equal else np.arange(lanes) % 997)
            order = Order(lengths, CELL)
            times = []
            for _ in range(200):
                start = rng.randrange(order.total - MICRO_BATCH)
                began = time.perf_counter()
                order.runs(start, start + MICRO_BATCH)
                times.append(1e3 * (time.perf_counter() - began))
            print(
                f"{lanes:5d} {'equal' if equal else 'unequal':8s} lanes: median {statistics.median(times):.3f} ms, "
                f"worst {max(times):.3f} ms, {order.lengths.nbytes + order.num_cells.nbytes} bytes"
            )


if __name__ == "__main__":
    main()
