"""What `loader-bench` measures, and where it measures it.

samples/s          between the end of the first step and the end of the last, by the wall clock; steady: of the last half
loader CPU         `cpu_s` of all loaders' PONGs, last minus first: all their processes, with read-ahead and the epoch's plan
client CPU         this process, from when all ranks are connected: all threads, including digest and report
records decoded    `records_decoded` of the PONGs, without records read ahead for no ticket, per distinct record seen here
first batch        from the start of the first `connect` to the slowest rank's first micro-batch
tickets            of all ranks; `TicketCounters` of `trainer/feed/client/tickets.py`
data wait          time blocked in `steps` / time, from each rank's first batch; of the worst rank
longest wait       of any rank for one step, without the first step
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.feed.batch import StepBatch
from trainer.feed.feed import Feed, FeedInfo
from trainer.training.bad_samples import Skipped

_RAMP_BIN_S = 0.25
_RAMP_BINS = 16

Progress = Sequence[Mapping[str, Mapping[str, float]]]  # of each rank: address -> counters


class BenchReport:
    """Collects figures while the ranks pull; then prints a table or a line of JSON."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._digest, self._stream_digest = hashlib.sha256(), hashlib.sha256()
        self._records: set[tuple[int, int]] = set()
        self._times: list[tuple[float, int]] = []  # (end of a step, samples so far)
        self._wait_s: list[list[float]] = []  # of each step: of each rank
        self._num_samples = self._num_supervised = 0
        self._skipped = Skipped()
        self._first: Progress = ()
        self.figures: dict[str, Any] = {}

    def begin(self) -> None:
        """The ranks start to connect now."""
        self._began = time.monotonic()

    def connected(self, info: FeedInfo, progress: Progress) -> None:
        """All ranks are connected."""
        self._info, self._first = info, progress
        self._client_cpu = time.process_time()

    def step(self, batches: Sequence[StepBatch]) -> None:
        """One step is done on all ranks; batches: by rank."""
        self._wait_s.append([batch.wait_s for batch in batches])
        for rank, batch in enumerate(batches):
            for micro in batch.micro_batches:
                self._digest.update(
                    batch.first_sample.to_bytes(8, "little") + rank.to_bytes(4, "little") + micro.digest
                )
                self._records.update(map(tuple, micro.sample_keys[:, :2].tolist()))
                self._num_samples += micro.num_rows
                self._num_supervised += micro.num_supervised
                self._skipped.add(micro.skipped)
        for same_pass in zip(*(batch.micro_batches for batch in batches), strict=True):
            for micro in same_pass:
                self._stream_digest.update(b"".join(micro.row_digests))
        self._times.append((time.monotonic(), self._num_samples))

    def ended(self, progress: Progress, feeds: Sequence[Feed]) -> None:
        """Everything is pulled: compute the figures."""
        client_cpu = time.process_time() - self._client_cpu
        samples = max(self._num_samples, 1)
        loader = {
            name: _difference(self._first, progress, name) for name in ("cpu_s", "records_decoded", "records_ahead")
        }
        self.figures = {
            "samples": self._num_samples,
            "samples_per_s": self._rate(0),
            "samples_per_s_steady": self._rate(len(self._times) // 2),
            "loader_cpu_ms_per_sample": 1e3 * loader["cpu_s"] / samples,
            "client_cpu_ms_per_sample": 1e3 * client_cpu / samples,
            "wire_bytes_per_sample": sum(feed.bytes_received for feed in feeds) / samples,
            "records_decoded_per_record": (loader["records_decoded"] - loader["records_ahead"])
            / max(len(self._records), 1),
            "first_batch_s": max((feed.first_batch_at or self._began) - self._began for feed in feeds),
            "data_wait_frac": self._data_wait_frac(0),
            "data_wait_frac_steady": self._data_wait_frac(len(self._times) // 2),
            "longest_wait_s": max((max(waits) for waits in self._wait_s[1:]), default=0.0),
            "digest": self._digest.hexdigest(),
            "stream_digest": self._stream_digest.hexdigest(),
            "steps": len(self._times),
            "supervised_tokens": self._num_supervised,
            "skipped": self._skipped.num_samples,
            "skipped_records": self._skipped.named,
            "records": len(self._records),
            **self._counters(feeds),
            "longest_gap_s": max(
                (after - before for (before, _), (after, _) in itertools.pairwise(self._times)), default=0.0
            ),
            "ranks": self._world_size,
            "loaders": len(self._info.loaders),
            "loader_threads": _total(progress, "threads"),
            "epoch_samples": self._info.num_samples,
            "ramp_bin_s": _RAMP_BIN_S,
            "ramp_samples_per_s": self._ramp(),
        }

    def table(self) -> str:
        """A table for users."""
        figures, steady = self.figures, 100 * self.figures["data_wait_frac_steady"]
        rows = [
            ("samples", f"{figures['samples']} in {figures['steps']} steps on {figures['ranks']} ranks"),
            ("samples/s", f"{figures['samples_per_s']:.1f}"),
            ("loader CPU", f"{figures['loader_cpu_ms_per_sample']:.3f} ms per sample, {figures['loaders']} loaders"),
            ("client CPU", f"{figures['client_cpu_ms_per_sample']:.3f} ms per sample"),
            ("wire", f"{figures['wire_bytes_per_sample']:.0f} bytes per sample"),
            ("records decoded", f"{figures['records_decoded_per_record']:.3f} times each"),
            ("first batch", f"{figures['first_batch_s']:.3f} s after connecting"),
            (
                "data wait",
                f"{100 * figures['data_wait_frac']:.2f}% of the time, worst rank; {steady:.2f}% in the last half; longest "
                f"{figures['longest_wait_s']:.3f} s",
            ),
            ("longest gap", f"{figures['longest_gap_s']:.3f} s between the ends of two steps"),
            (
                "tickets",
                f"{figures['tickets']}; {figures['hedges']} hedged ({100 * figures['hedged_share']:.2f}%, "
                f"{figures['hedges_won']} won), {figures['reissued']} asked again, {figures['duplicates']} answers dropped "
                f"({100 * figures['duplicate_share']:.2f}%), {figures['takeovers']} takeovers",
            ),
            ("skipped", f"{figures['skipped']} bad samples{':' if figures['skipped'] else ''}"),
            *(("", line) for line in self._skipped.lines()),
            (
                "digest",
                f"{figures['digest'][:16]}  (of the stream, for any number of ranks: {figures['stream_digest'][:16]})",
            ),
            ("ramp", f"samples/s in each {_RAMP_BIN_S} s from the first batch on:"),
        ]
        lines = [f"{name:<16} {value}" for name, value in rows]
        return "\n".join([*lines, f"{'':<16} {' '.join(f'{rate:.0f}' for rate in figures['ramp_samples_per_s'])}"])

    def json_line(self) -> str:
        """One line of JSON for programs."""
        return json.dumps(self.figures)

    @staticmethod
    def _counters(feeds: Sequence[Feed]) -> dict[str, float]:
        """Ticket counters of all ranks together; shares are per ticket."""
        total: Counter[str] = Counter()
        for feed in feeds:
            total.update(dataclasses.asdict(feed.counters()))
        tickets = max(total["tickets"], 1)
        shares = {"hedged_share": total["hedges"] / tickets, "duplicate_share": total["duplicates"] / tickets}
        return {**total, **shares}

    def _rate(self, after: int) -> float:
        """samples/s from the end of step `after` on."""
        if len(self._times) < after + 2:
            return self._num_samples / max(self._times[-1][0] - self._began, 1e-9) if self._times else 0.0
        (first_end, first), (last_end, last) = self._times[after], self._times[-1]
        return (last - first) / max(last_end - first_end, 1e-9)

    def _data_wait_frac(self, after: int) -> float:
        """Data wait of the worst rank, from the end of step `after` on."""
        if len(self._times) < after + 2:
            return 0.0
        worst: float = max(sum(waits) for waits in zip(*self._wait_s[after + 1 :], strict=True))
        return worst / max(self._times[-1][0] - self._times[after][0], 1e-9)

    def _ramp(self) -> list[float]:
        """samples/s in each time bin from the end of the first step, up to the end of the run."""
        if len(self._times) < 2:
            return []
        begin = self._times[0][0]
        num_bins = min(int((self._times[-1][0] - begin) / _RAMP_BIN_S), _RAMP_BINS)
        counts = [0] * num_bins
        for (_, before), (end, after) in zip(self._times, self._times[1:], strict=False):
            position = int((end - begin) / _RAMP_BIN_S)
            if position < num_bins:
                counts[position] += after - before
        return [count / _RAMP_BIN_S for count in counts]


def _total(progress: Progress, name: str) -> int:
    """Sum of a gauge over all loaders, by the newest value of any rank; 0 where they do not tell it."""
    addresses = {address for rank in progress for address in rank}
    return int(sum(max(rank[address].get(name, 0) for rank in progress if address in rank) for address in addresses))


_GAUGES = {"records_ahead"}  # gauges may fall; a counter that fell belongs to a restarted loader


def _difference(first: Progress, last: Progress, name: str) -> float:
    """Growth of a counter over all loaders: the newest value of any rank minus the oldest. A restarted loader began at 0."""
    total = 0.0
    for address in {address for rank in last for address in rank}:
        new = max(rank[address].get(name, 0.0) for rank in last if address in rank)
        old = min((rank[address].get(name, 0.0) for rank in first if address in rank), default=0.0)
        restarted = new < old and name not in _GAUGES
        total += new if restarted else new - old
    return total
