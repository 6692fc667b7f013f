"""Every metric of loaders and trainers: its name, kind, labels and meaning stand in `METRICS`, and nowhere else.

    samples = {"stoker_loader_stage_seconds_total": {("read",): 12.5, ("encode",): 40.0}, "stoker_loader_ready": {(): 1.0}}
    text = exposition(samples)             # what Prometheus scrapes; needs the extra `metrics`
    parse(text) == samples

Seconds, bytes and samples are base units; what only grows ends in `_total`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stoker_proto.errors import ConfigError

Samples = Mapping[str, Mapping[tuple[str, ...], float]]
"""Name of the metric -> values of its labels -> value."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    help: str
    labels: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    # -- of each loader
    "stoker_loader_info": Metric(
        "Always 1. loader: name of this incarnation; address: where ranks reach it", ("loader", "address")
    ),
    "stoker_loader_ready": Metric("1: it takes tickets; 0: it drains"),
    "stoker_loader_uptime_seconds": Metric("Seconds since its data was prepared"),
    "stoker_loader_ranks": Metric("Connections that said HELLO and agreed"),
    "stoker_loader_tickets": Metric(
        "Tickets now. state: waiting (for the plan of their epoch), building (with the workers)", ("state",)
    ),
    "stoker_loader_answers_total": Metric(
        "Tickets answered, by the kind of answer: piece, or the reason of a FAILURE", ("answer",)
    ),
    "stoker_loader_samples_total": Metric("Samples put into pieces"),
    "stoker_loader_stage_seconds_total": Metric(
        "Seconds of the building threads in each stage; queue: of tickets until their records were there; send: of the front",
        ("stage",),
    ),
    "stoker_loader_threads": Metric(
        "Building threads over all workers: they can be busy for so many seconds in a second"
    ),
    "stoker_loader_cpu_seconds_total": Metric("CPU seconds of all its processes, ended ones included"),
    "stoker_loader_resident_bytes": Metric("Memory of all its processes (resident)"),
    "stoker_loader_records_decoded_total": Metric("Records decoded; a record decoded twice counts twice"),
    "stoker_loader_records_distinct_total": Metric("Of these, different ones, counted separately for each epoch"),
    "stoker_loader_records_ahead": Metric("Records in memory that no ticket has asked for yet"),
    "stoker_loader_cache_hits_total": Metric("Records that a ticket found in memory"),
    "stoker_loader_cache_misses_total": Metric("Records that a ticket did not find in memory"),
    "stoker_loader_cache_bytes": Metric("Encoded records in memory"),
    "stoker_loader_cache_limit_bytes": Metric("loader.cache_mb"),
    "stoker_loader_disk_cache_hits_total": Metric(
        "Records found in the cache on disk, not decoded (loader.disk_cache_gb)"
    ),
    "stoker_loader_disk_cache_misses_total": Metric("Records looked for in the cache on disk, and decoded then"),
    "stoker_loader_disk_cache_read_bytes_total": Metric("Bytes of the records found there"),
    "stoker_loader_disk_cache_written_bytes_total": Metric("Bytes of the records that this loader kept there"),
    "stoker_loader_disk_cache_damaged_total": Metric(
        "Records there with a wrong checksum, or cut short: they were decoded again"
    ),
    "stoker_loader_sent_bytes_total": Metric("Bytes of all frames sent"),
    "stoker_loader_unread_bytes": Metric("Bytes sent to ranks that have not read them"),
    "stoker_loader_dropped_frames_total": Metric("Answers dropped because a rank did not read"),
    "stoker_loader_bad_samples_total": Metric("Samples sent without labels because their record is bad"),
    "stoker_loader_excluded_samples_total": Metric("Samples sent without labels because data.exclude names them"),
    "stoker_loader_refused_peers_total": Metric(
        "Peers turned away. reason: key (handshake), fingerprint (HELLO that differs), message (broke the protocol)",
        ("reason",),
    ),
    # -- of the trainer's first rank
    "stoker_trainer_info": Metric("Always 1. ranks: number of ranks", ("ranks",)),
    "stoker_trainer_steps_total": Metric("Optimizer steps of this start"),
    "stoker_trainer_samples_total": Metric("Rows trained since this start, over all ranks"),
    "stoker_trainer_step_seconds_total": Metric("Seconds of the steps, data wait included"),
    "stoker_trainer_data_wait_seconds_total": Metric("Of these, seconds in which the worst rank waited for data"),
    "stoker_trainer_queue_depth": Metric("Micro-batches ready at the rank that has fewest"),
    "stoker_trainer_tickets_total": Metric("Tickets of the first rank, each counted once"),
    "stoker_trainer_reissued_total": Metric("Tickets sent again: the loader went away, failed, or was late"),
    "stoker_trainer_hedges_total": Metric("Tickets sent to a second loader while the first may still answer"),
    "stoker_trainer_hedges_won_total": Metric("Hedges that the second loader answered first"),
    "stoker_trainer_takeovers_total": Metric("How often other loaders took over lanes of a slow one"),
    "stoker_trainer_duplicates_total": Metric("Answers dropped because the ticket had one already"),
    "stoker_trainer_loader_ready": Metric("1: the loader at this address is ready", ("loader",)),
    "stoker_trainer_loader_samples_total": Metric("Samples that the first rank had of the loader", ("loader",)),
    "stoker_trainer_loader_share": Metric("Share of its lanes that the loader has: 1, 0.5, 0.25 ... 0", ("loader",)),
    "stoker_trainer_loader_latency_seconds": Metric("Median of the last 64 answers of the loader", ("loader",)),
    "stoker_trainer_loader_open_tickets": Metric("Tickets that the loader has not answered yet", ("loader",)),
}


def exposition(samples: Samples) -> bytes:
    """The text that Prometheus reads. Raises KeyError for a name that is not in the table, ValueError for wrong labels."""
    client = import_client()
    families = [_family(client, name, METRICS[name], values) for name, values in samples.items()]

    class Once:
        """What prometheus_client calls a collector."""

        def collect(self) -> list[Any]:
            return families

    registry = client.CollectorRegistry(auto_describe=False)
    registry.register(Once())
    text: bytes = client.generate_latest(registry)
    return text


def _family(client: Any, name: str, metric: Metric, values: Mapping[tuple[str, ...], float]) -> Any:
    core = client.metrics_core
    kind = core.CounterMetricFamily if name.endswith("_total") else core.GaugeMetricFamily
    family = kind(name.removesuffix("_total"), metric.help, labels=metric.labels)
    for labels, value in values.items():
        if len(labels) != len(metric.labels):
            raise ValueError(f"{name} has labels {metric.labels}, not {labels}")
        family.add_metric(labels, value)
    return family


def parse(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """The samples of `exposition`; metrics that are not in the table are left out. Raises ValueError for other text."""
    client = import_client()
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for family in client.parser.text_string_to_metric_families(text):
        for sample in family.samples:
            metric = METRICS.get(sample.name)
            if metric is not None:
                labels = tuple(sample.labels.get(label, "") for label in metric.labels)
                found.setdefault(sample.name, {})[labels] = sample.value
    return found


def import_client() -> Any:
    """The package prometheus_client. Raises ConfigError where it is not installed."""
    try:
        importlib.import_module("prometheus_client.parser")
        return importlib.import_module("prometheus_client")
    except ImportError as error:
        raise ConfigError(
            "metrics need the package prometheus_client, which is not installed: pip install 'stoker[metrics]', or leave "
            "--metrics out"
        ) from error
