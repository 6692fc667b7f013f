"""What an epoch's plan costs: time to make it, bytes per trajectory, time to open any position.

python tests/benchmarks/plan_scale.py [--trajectories 4500000] [--length 80]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time

import numpy as np

from loader_service.plan.lane_plan import PlanKey
from loader_service.plan.record_plan import RecordPlan
from stoker_proto.config import OrderConfig
from stoker_proto.order.lanes import Order

MANIFEST_BYTES = 4 + 8 + 4 + 4  # shard, offset, size, samples: one file-backed row of the manifest's columns


def main() -> None:
    """Plan a first and a second epoch of synthetic lengths and open random positions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=4_500_000)
    parser.add_argument("--length", type=int, default=80, help="mean timesteps of a trajectory; default: %(default)s")
    parser.add_argument("--lanes", type=int, default=32)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    num_samples = rng.integers(arguments.length // 2, 3 * arguments.length // 2, arguments.trajectories).astype(
        np.uint32
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for epoch in (0, 1):
        started = time.process_time()
        plan = RecordPlan.make(num_samples, OrderConfig(lanes=arguments.lanes), PlanKey("train", epoch, 0))
        order = Order(plan.lane_lengths(), plan.order.cell, plan.lane_starts())
        made = time.process_time() - started
        times = []
        for position in rng.integers(0, order.total - 64, 200).tolist():
            started = time.perf_counter()
            for run in order.runs(position, position + 64):
                plan.rows(run.lane, run.start, run.count)
            times.append(time.perf_counter() - started)
        plan_bytes = plan.records.nbytes + plan.ends.nbytes
        print(
            f"epoch {epoch}: {order.total:,} samples planned in {made:.2f} CPU s; "
            f"{plan_bytes / arguments.trajectories:.1f} bytes per trajectory + {MANIFEST_BYTES} of the manifest, 0 per sample; "
            f"64 samples from a random position in {1e3 * statistics.median(times):.2f} ms (worst {1e3 * max(times):.2f})"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"peak while planning: {1024 * peak / arguments.trajectories:.0f} bytes per trajectory, given back afterwards"
    )


if __name__ == "__main__":
    main()
