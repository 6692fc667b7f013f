"""Two moments -> what each program did between them, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from loader_service.top.scrape import Scrape
from stoker_proto.fleet.verdict import Counters, Judge, LoaderWork, TrainerWork, Verdict, work_between
from stoker_proto.host.stages import STAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderRow:
    """One loader in a window. Rates and shares are None where the window is empty, or it restarted in it."""

    number: int
    address: str
    error: str = ""
    is_ready: bool = False
    ranks: int = 0
    queue: int = 0
    """Tickets that wait or are being built."""
    memory_bytes: float = 0.0
    cache_bytes: float = 0.0
    cache_limit_bytes: float = 0.0
    samples_per_s: float | None = None
    busy: float | None = None
    """Share of its threads' time."""
    stages: dict[str, float] = field(default_factory=dict)
    """Share of the busy time."""
    cpu_cores: float | None = None
    cache_hits: float | None = None
    """Share of the records that tickets asked for."""

    @property
    def name(self) -> str:
        """For verdicts."""
        return f"loader {self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerRow:
    """One trainer in a window."""

    address: str
    ranks: int
    steps: int
    queue_depth: int
    samples_per_s: float | None = None
    wait: float | None = None
    """Share of the step time."""
    step_s: float | None = None
    loaders: dict[str, dict[str, float]] = field(default_factory=dict)
    """Address of a loader -> its ready, share, latency_s, open_tickets, as the first rank sees them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetView:
    """All of it."""

    loaders: tuple[LoaderRow, ...]
    trainers: tuple[TrainerRow, ...]
    lost: tuple[tuple[str, str], ...]
    """(address, reason) of what does not answer and is not known to be a loader."""
    verdicts: tuple[Verdict, ...]
    window_s: float

    def to_json(self) -> dict[str, Any]:
        """For programs; the names are those of the fields."""
        return asdict(self)


class Fleet:
    """Keeps what is known of each address over a run of looks."""

    def __init__(self) -> None:
        self._judge = Judge()
        self._numbers: dict[str, int] = {}  # addresses of loaders, in the order in which they were first seen

    def view(self, before: Sequence[Scrape], after: Sequence[Scrape], now: datetime) -> FleetView:
        """What happened between the two."""
        old = {one.address: one for one in before}
        loaders: list[LoaderRow] = []
        trainers: list[TrainerRow] = []
        lost: list[tuple[str, str]] = []
        works: list[LoaderWork] = []
        trained: list[TrainerWork] = []
        for one in after:
            earlier = old.get(one.address)
            if one.is_loader:
                number = self._numbers.setdefault(one.address, len(self._numbers) + 1)
                work = None
                if earlier is not None and earlier.is_loader:
                    work = work_between(f"loader {number}", _counters(earlier), _counters(one))
                works += [] if work is None else [work]
                loaders.append(_loader_row(number, earlier, one, work))
            elif one.is_trainer:
                work_of_trainer = _trainer_work(earlier, one)
                trained += [] if work_of_trainer is None else [work_of_trainer]
                trainers.append(_trainer_row(one, work_of_trainer))
            elif one.address in self._numbers:
                loaders.append(LoaderRow(number=self._numbers[one.address], address=one.address, error=one.error))
            else:
                lost.append((one.address, one.error))
        verdicts = self._judge.look(works, _together(trained), now)
        return FleetView(
            loaders=tuple(sorted(loaders, key=lambda row: row.number)),
            trainers=tuple(trainers),
            lost=tuple(lost),
            verdicts=tuple(verdicts),
            window_s=max((one.at for one in after), default=0.0) - max((one.at for one in before), default=0.0),
        )


def _counters(one: Scrape) -> Counters:
    stages = one.labelled("stoker_loader_stage_seconds_total")
    return Counters(
        uptime_s=one.value("stoker_loader_uptime_seconds"),
        samples=one.value("stoker_loader_samples_total"),
        records=one.value("stoker_loader_records_decoded_total"),
        threads=one.value("stoker_loader_threads"),
        stage_s={stage: stages.get(stage, 0.0) for stage in STAGES},
    )


def _loader_row(number: int, before: Scrape | None, one: Scrape, work: LoaderWork | None) -> LoaderRow:
    busy_s = 0.0 if work is None else sum(work.stage_s.values())
    cpu_cores = cache_hits = None
    if work is not None and before is not None:
        cpu = "stoker_loader_cpu_seconds_total"
        cpu_cores = max(one.value(cpu) - before.value(cpu), 0.0) / work.seconds
        hits, misses = (
            one.value(f"stoker_loader_cache_{name}_total") - before.value(f"stoker_loader_cache_{name}_total")
            for name in ("hits", "misses")
        )
        cache_hits = hits / (hits + misses) if hits + misses > 0 else None
    return LoaderRow(
        number=number,
        address=one.address,
        is_ready=one.value("stoker_loader_ready") == 1,
        ranks=int(one.value("stoker_loader_ranks")),
        queue=int(sum(one.labelled("stoker_loader_tickets").values())),
        memory_bytes=one.value("stoker_loader_resident_bytes"),
        cache_bytes=one.value("stoker_loader_cache_bytes"),
        cache_limit_bytes=one.value("stoker_loader_cache_limit_bytes"),
        samples_per_s=None if work is None else work.samples_per_s,
        busy=None if work is None else work.busy,
        stages={} if work is None or not busy_s else {stage: s / busy_s for stage, s in work.stage_s.items()},
        cpu_cores=cpu_cores,
        cache_hits=cache_hits,
    )


def _trainer_work(before: Scrape | None, one: Scrape) -> TrainerWork | None:
    if before is None or not before.is_trainer:
        return None
    names = ("samples", "step_seconds", "data_wait_seconds")
    samples, step_s, wait_s = (
        one.value(f"stoker_trainer_{name}_total") - before.value(f"stoker_trainer_{name}_total") for name in names
    )
    return TrainerWork(samples=samples, step_s=step_s, wait_s=wait_s) if samples > 0 and step_s > 0 else None


def _together(trainers: Sequence[TrainerWork]) -> TrainerWork | None:
    """Several trainers on one fleet as one that takes what all of them take; None without one."""
    if not trainers:
        return None
    return TrainerWork(
        samples=sum(one.samples for one in trainers),
        step_s=sum(one.step_s for one in trainers) / len(trainers),
        wait_s=sum(one.wait_s for one in trainers) / len(trainers),
    )


def _trainer_row(one: Scrape, work: TrainerWork | None) -> TrainerRow:
    seen: dict[str, dict[str, float]] = {}
    for metric, name in (
        ("ready", "ready"), ("share", "share"), ("latency_seconds", "latency_s"), ("open_tickets", "open_tickets")
    ):  # fmt: skip
        for address, value in one.labelled(f"stoker_trainer_loader_{metric}").items():
            seen.setdefault(address, {})[name] = value
    ranks = next(iter(one.labelled("stoker_trainer_info")), "0")
    return TrainerRow(
        address=one.address,
        ranks=int(ranks) if ranks.isdecimal() else 0,
        steps=int(one.value("stoker_trainer_steps_total")),
        queue_depth=int(one.value("stoker_trainer_queue_depth")),
        samples_per_s=None if work is None else work.samples / work.step_s,
        wait=None if work is None else work.wait,
        step_s=None if work is None else work.step_s,
        loaders=seen,
    )
