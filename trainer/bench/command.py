"""`loader-bench`: a trainer without a model. Pulls an epoch (or a part) as W ranks would, and reports cost and throughput.

    loader-bench --config C --connect tcp://127.0.0.1:5555 --ranks 2 --batches 200 --step-time-ms 50 --json
    loader-bench --config C --connect tcp://127.0.0.1:5555 --plan --gpus 8,64,512 --rate 50

The ranks are threads of one process, each with its own `Feed`. They run in lockstep as real ranks do: none begins a step before
all have ended the last one. `trainer/bench/report.py` says what is measured where.
"""

from __future__ import annotations

import argparse
import logging
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from stoker_proto.config import Config
from stoker_proto.config.reader import add_config_arguments, load_config
from stoker_proto.errors import ConfigError, StokerError
from stoker_proto.host.descriptors import raise_descriptor_limit
from stoker_proto.host.interrupts import heed_interrupts
from trainer.bench.planning import add_plan_arguments, print_plan
from trainer.bench.report import BenchReport
from trainer.feed.batch import Decoding, StepBatch
from trainer.feed.feed import Feed
from trainer.report.fleet import FleetReport

_FRESH_S = 10.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="loader-bench",
        description="Measure loaders without training: batches are pulled, decoded to uint8 arrays, and dropped.",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--connect",
        action="append",
        default=[],
        metavar="ADDR",
        help="a loader's address; repeatable; default: cluster.loader_addresses",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="W", help="trainer ranks to act as; default: %(default)s"
    )
    parser.add_argument("--batches", type=int, metavar="N", help="global batches (optimizer steps); default: the epoch")
    parser.add_argument("--split", choices=["train", "val"], default="train", help="default: %(default)s")
    parser.add_argument("--epoch", type=int, default=0, metavar="E", help="default: %(default)s")
    parser.add_argument(
        "--start-sample", type=int, default=0, metavar="S", help="start the epoch at this sample, as a resume does"
    )
    parser.add_argument("--step-time-ms", type=float, default=0.0, metavar="X", help="sleep this long in each step")
    parser.add_argument(
        "--decode-threads", type=int, default=1, metavar="N", help="decode threads of each rank; default: %(default)s"
    )
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="serve the metrics of a trainer at http://HOST:PORT/metrics (needs the extra `metrics`)",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as one last line of JSON")
    add_plan_arguments(parser)
    return parser.parse_args(argv)


_LEAST = {"ranks": 1, "batches": 1, "epoch": 0, "start_sample": 0, "step_time_ms": 0, "decode_threads": 1}


def check_ranges(arguments: argparse.Namespace) -> None:
    """Raises ConfigError, which names the flag."""
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and not value >= least:  # written this way, it rejects NaN too
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: it must be {least} or more")


class NullTrainer:
    """W ranks that only pull micro-batches."""

    def __init__(self, config: Config, arguments: argparse.Namespace, report: BenchReport) -> None:
        self._arguments, self._report = arguments, report
        # No epoch after the measured one is fetched ahead.
        config = replace(config, trainer=replace(config.trainer, epochs=arguments.epoch + 1))
        decoding = Decoding(threads=arguments.decode_threads)
        self._feeds = [
            Feed(config, arguments.split, rank, arguments.ranks, decoding=decoding) for rank in range(arguments.ranks)
        ]
        self._batches: list[StepBatch | None] = [None] * arguments.ranks
        self._barrier = threading.Barrier(arguments.ranks, action=self._step_done)
        self._errors: list[BaseException] = []
        self._bar: tqdm[Any] | None = None

    def run(self) -> None:
        """Pull everything. Raises the first error of a rank."""
        threads = [threading.Thread(target=self._rank, args=(rank,), daemon=True) for rank in range(len(self._feeds))]
        with ExitStack() as stack:
            for feed in self._feeds:
                stack.callback(feed.close)
            self._fleet = FleetReport(self._feeds[0], metrics=self._arguments.metrics, flag="--metrics")
            stack.callback(self._fleet.close)
            self._report.begin()
            infos = [feed.connect(self._arguments.epoch) for feed in self._feeds]
            progress = [feed.first_progress() for feed in self._feeds]
            left = infos[0].num_samples - self._arguments.start_sample
            if left <= 0:
                raise ConfigError(
                    f"--start-sample is {self._arguments.start_sample}: epoch {self._arguments.epoch} has "
                    f"{infos[0].num_samples} samples, counted from 0"
                )
            steps = -(-left // self._feeds[0].global_batch_size)
            steps = min(steps, self._arguments.batches or steps)
            self._bar = stack.enter_context(tqdm(total=steps, unit="step", disable=None, file=sys.stderr))
            self._report.connected(infos[0], progress)
            self._stepped_at = time.monotonic()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if self._errors:
                raise self._errors[0]
            progress = [feed.progress(fresh_within_s=_FRESH_S) for feed in self._feeds]
            self._report.ended(progress, self._feeds)

    def _rank(self, rank: int) -> None:
        try:
            self._pull(rank)
        except threading.BrokenBarrierError:
            return  # another rank failed first, and its error is shown
        except BaseException as error:  # noqa: BLE001  (the thread's edge: `run` raises it)
            self._errors.append(error)
            self._barrier.abort()

    def _pull(self, rank: int) -> None:
        arguments = self._arguments
        for count, batch in enumerate(self._feeds[rank].steps(arguments.epoch, arguments.start_sample), start=1):
            time.sleep(arguments.step_time_ms / 1000)
            self._batches[rank] = batch
            self._barrier.wait()
            if count == arguments.batches:
                return

    def _step_done(self) -> None:
        """Runs in one of the threads when all ranks have their part of the step."""
        batches = [batch for batch in self._batches if batch is not None]
        self._report.step(batches)
        now = time.monotonic()
        self._fleet.step(
            num_rows=sum(micro.num_rows for batch in batches for micro in batch.micro_batches),
            step_s=now - self._stepped_at,
            wait_s=max(batch.wait_s for batch in batches),
            queue_depth=min(feed.num_ready for feed in self._feeds),
        )
        self._stepped_at = now
        if self._bar is not None:
            self._bar.update()


def pull(config: Config, arguments: argparse.Namespace) -> BenchReport:
    """Pull everything that the arguments ask for. Raises StokerError."""
    report = BenchReport(world_size=arguments.ranks)
    NullTrainer(config, arguments, report).run()
    return report


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    raise_descriptor_limit()
    heed_interrupts()
    try:
        check_ranges(arguments)
        config = load_config(arguments.config, arguments.set)
        if arguments.connect:
            cluster = replace(config.cluster, loader_addresses=tuple(arguments.connect))
            config = replace(config, cluster=cluster)
        if arguments.plan:
            print_plan(config, arguments, lambda config, arguments: pull(config, arguments).figures)
            return
        report = pull(config, arguments)
    except StokerError as error:
        sys.exit(f"loader-bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(report.table())
    if arguments.json:
        print(report.json_line())


if __name__ == "__main__":
    main()
