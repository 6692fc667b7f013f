"""What stage clocks and scrapes cost a loader, of its CPU time: `python tests/benchmarks/metrics_cost.py [PAIRS]`.

Clocks: each record is read and encoded with a clock and without one, in turns, in one thread; CPU time of that thread.
Scrapes: CPU time of this process for a page of /metrics, of a loader that has served; Prometheus asks four times a minute.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from loader_service.pieces.encoder import RecordEncoder
from loader_service.prepare.run import prepare
from stoker_proto.config.reader import load_config
from stoker_proto.fleet.metrics import METRICS, exposition
from stoker_proto.host import stages
from stoker_proto.processor import Processor
from tests.end_to_end.fleet import write_config, write_demonstrations
from tests.tiny_models import write_model_folder

RECORDS, STEPS = 8, 40


def main() -> None:
    """Print both costs."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demos = write_demonstrations(folder / "demos", [STEPS] * RECORDS, size=224)
        config = load_config(write_config(folder, write_model_folder(folder / "model"), [demos]))
        prepared = prepare(config)
        encoder = RecordEncoder(config.data, Processor.build(config, prepared.codec, prepared.states))
        manifest = prepared.entries["train"][0]

        def encode(record: int, *, with_clock: bool) -> float:
            stages._local.clock = stages.StageClock() if with_clock else None
            began = time.thread_time()
            stages.switch(stages.READ)
            encoder.encode(manifest, record, 0)
            stages.switch(stages.IDLE)
            return time.thread_time() - began

        ratios, plain = [], []
        for number in range(-RECORDS, pairs):
            order = random.sample([True, False], 2)
            seconds = {which: encode(number % RECORDS, with_clock=which) for which in order}
            if number >= 0:  # the first round warms up
                ratios.append(seconds[True] / seconds[False] - 1)
                plain.append(seconds[False])
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    per_sample = statistics.median(plain) / STEPS
    print(
        f"clocks: {statistics.mean(ratios):+.3%} of CPU (median {statistics.median(ratios):+.3%}, standard error {error:.3%}, "
    )
    print(f"        {pairs} pairs in turns; a sample takes {1e3 * per_sample:.3f} ms)")
    stages._local.clock = stages.StageClock()
    began = time.thread_time()
    for _ in range(100_000):
        stages.switch(stages.READ)
    each = (time.thread_time() - began) / 100_000
    print(f"        a switch takes {1e9 * each:.0f} ns; 3 of them a sample are {3 * each / per_sample:.3%}")
    values = {name: {("a",) * len(metric.labels): 1.0} for name, metric in METRICS.items()}
    began = time.thread_time()
    for _ in range(100):
        exposition(values)
    page = (time.thread_time() - began) / 100
    print(f"scrapes: a page takes {1e3 * page:.2f} ms; one each 15 s is {page / 15:.4%} of a core")


if __name__ == "__main__":
    main()
