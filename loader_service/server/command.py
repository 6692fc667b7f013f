"""`loader-serve`: prepare what is missing, start the workers, serve until told to stop.

The flow: arguments -> which entries this loader holds -> manifests and codec -> processor -> workers -> socket.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import zmq

from loader_service.disk_cache.folder import check_disk_cache
from loader_service.pieces.device_images import image_libraries
from loader_service.pieces.excluded import Excluded
from loader_service.plan.record_plan import PLAN_VERSION
from loader_service.plan.token_counts import check_token_counts
from loader_service.prepare.first_records import check_first_records
from loader_service.prepare.run import Prepared, ScanOptions, prepare
from loader_service.server.listening import is_loopback, parse_bind
from loader_service.server.operator_pages import OperatorPages
from loader_service.server.pool import InlinePool, Pool, WorkerPool
from loader_service.server.run_directory import run_directory
from loader_service.server.served import Served
from loader_service.server.server import LoaderServer
from loader_service.server.shard_selection import check_parts, held_shards
from loader_service.sources.base import make_datasets
from stoker_proto.config import Config, DataConfig
from stoker_proto.config.reader import add_config_arguments, config_to_tree, load_config
from stoker_proto.config.rules import check_ranges
from stoker_proto.errors import ConfigError, StokerError
from stoker_proto.hashing import fingerprint
from stoker_proto.images.transport_cost import log_choice
from stoker_proto.order.lanes import order_fingerprint
from stoker_proto.processor import Processor
from stoker_proto.wire.keys import Key, loader_keys

logger = logging.getLogger(__name__)

_WORKERS_START_DEADLINE_S = 60.0
LoaderKeys = tuple[Key, dict[bytes, str]]

CORES_PER_WORKER = 4
"""Threads that one interpreter can keep busy: a sample holds its lock for about a seventh of the time."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line of `loader-serve`."""
    parser = argparse.ArgumentParser(
        prog="loader-serve",
        description="Serve training batches: decode trajectories, encode images, tokenise, and answer trainer ranks over "
        "ZeroMQ. Any number of loaders may serve the same run; all read the same YAML as the trainer.",
        epilog="example: loader-serve --config deploy/configs/demo.yaml --bind tcp://127.0.0.1:5555",
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--shards",
        nargs="+",
        metavar="GLOB",
        help="serve only the matching files of the data paths: whole entries, or parts of entries; other loaders serve the rest. "
        "The other files may be missing here if the .stoker folder was copied from a host that has all files; default: all",
    )
    parser.add_argument(
        "--bind", default="tcp://127.0.0.1:5555", metavar="ADDR", help="default: %(default)s; port * = any"
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow --bind beyond loopback without keys: any machine that reaches the port may read the data",
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="where manifests are kept; default: a .stoker folder beside the data"
    )
    parser.add_argument(
        "--device", metavar="D", help="cpu, or cuda:0 to resize and encode frames on that GPU; default: loader.device"
    )
    parser.add_argument("--check", action="store_true", help="validate config and data, build one batch, and exit")
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds for open tickets after SIGTERM; default: %(default)s",
    )
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="serve metrics for Prometheus and loader-top at http://HOST:PORT/metrics (needs the extra `metrics`)",
    )
    parser.add_argument(
        "--health",
        metavar="HOST:PORT",
        help="answer probes: /livez (the loader works, or still prepares its data) and /readyz (it takes tickets)",
    )
    parser.add_argument("--log-level", default="WARNING", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser.parse_args(argv)


def serve(arguments: argparse.Namespace) -> None:
    """Run one loader. Raises StokerError."""
    os.environ.setdefault(
        "TOKENIZERS_PARALLELISM", "false"
    )  # the builders' threads are the parallelism, also in workers
    config, keys = read_config(arguments)
    with closing(OperatorPages(metrics=arguments.metrics, health=arguments.health)) as pages:
        _serve(arguments, config, keys, pages)


def _serve(arguments: argparse.Namespace, config: Config, keys: LoaderKeys | None, pages: OperatorPages) -> None:
    prepared, processor, tokens = read_data(config, arguments)
    excluded = Excluded.read(config.data)
    excluded.check(manifest for held in prepared.entries.values() for manifest in held.values())
    fingerprints = all_fingerprints(config, prepared, processor, excluded)
    log_choice(logger, config.data.image, processor.image)
    served = Served(config, prepared.entries, fingerprints, processor.to_json(), tokens)
    with run_directory() as run_dir, zmq.Context() as context:
        cores = config.loader.cores or cpu_count()
        num_workers = config.loader.workers or -(-cores // CORES_PER_WORKER)
        num_threads = config.loader.threads or -(-cores // num_workers)
        served.write_job(run_dir, processor, excluded, num_workers, num_threads)
        pool: Pool = (
            InlinePool(run_dir, num_threads)
            if num_workers == 1
            else WorkerPool(context, run_dir, num_workers, num_threads)
        )
        server = LoaderServer(served, run_dir, pool, context, keys)
        try:
            signal.signal(signal.SIGTERM, lambda *_: server.drain(arguments.drain_timeout))
            signal.signal(signal.SIGINT, lambda *_: server.stop())
            server.plan_ahead()
            pool.start(_WORKERS_START_DEADLINE_S)
            address = server.bind(arguments.bind)  # last: from then on strangers may take descriptors
            pages.serve(server, address)
            print(f"loader-serve ready {address} {describe(prepared, processor, fingerprints)}", flush=True)
            server.run()
        finally:
            server.close()
            pool.stop()


def check(arguments: argparse.Namespace) -> None:
    """`--check`: everything up to one encoded record of each entry. Raises StokerError."""
    from loader_service.pieces.encoder import RecordEncoder  # workers build; the front needs it only here

    config, _ = read_config(arguments)
    prepared, processor, _ = read_data(config, arguments)
    excluded = Excluded.read(config.data)
    excluded.check(manifest for held in prepared.entries.values() for manifest in held.values())
    encoder = RecordEncoder(config.data, processor, config.loader, excluded)
    started = time.process_time()
    for split, entries in prepared.entries.items():
        for manifest in entries.values():
            for record in manifest.first_records(manifest.num_records)[:1]:
                encoded = encoder.encode(manifest, record, 0)
                if encoded.error is not None:
                    raise StokerError(f"{split} {manifest.path}: {encoded.error}")
    print(f"loader-serve check passed {describe(prepared, processor, all_fingerprints(config, prepared, processor))}")
    logger.info("one record of each entry took %.3f CPU s", time.process_time() - started)


def read_config(arguments: argparse.Namespace) -> tuple[Config, LoaderKeys | None]:
    """The config, and the keys that it names for loaders. Raises ConfigError, also where --bind is not safe with them."""
    config = load_config(arguments.config, arguments.set)
    if arguments.cache_dir is not None:  # part of the config, so that workers unpack compressed shards there too
        config = replace(config, data=replace(config.data, cache_dir=arguments.cache_dir))
    if arguments.device is not None:
        config = replace(config, loader=replace(config.loader, device=arguments.device))
        check_ranges(config.loader, "loader.")
    keys = loader_keys(config.cluster.security)
    check_bind(arguments.bind, insecure=arguments.insecure, authenticated=keys is not None)
    check_disk_cache(config)
    return config, keys


def read_data(config: Config, arguments: argparse.Namespace) -> tuple[Prepared, Processor, dict[str, dict[int, int]]]:
    """The prepared data, the processor, and split -> entry -> tokens of its samples. Raises StokerError."""
    Processor.build(config, None)  # so that a wrong model folder is an error before a long scan
    held = held_shards(config, arguments.shards)
    prepared = prepare(config, held=held, scan=ScanOptions(progress=True))
    check_parts(prepared.entries, config.data)
    check_token_counts(prepared.entries, config.data)
    processor = Processor.build(config, prepared.codec, prepared.states)
    return prepared, processor, check_first_records(config, prepared, processor)


def check_bind(address: str, *, insecure: bool, authenticated: bool) -> None:
    """Raises ConfigError for an address that other machines reach, unless there are keys or --insecure."""
    host, _ = parse_bind(address)
    if not (is_loopback(host) or authenticated or insecure):
        raise ConfigError(
            f"--bind {address} is reachable from other machines, and without keys ranks are not authenticated: make keys with "
            "loader-keys and name them in cluster.security, or bind tcp://127.0.0.1:PORT, or say --insecure on a network that "
            "only you can reach"
        )


def all_fingerprints(
    config: Config, prepared: Prepared, processor: Processor, excluded: Excluded | None = None
) -> dict[str, str]:
    """Fingerprints of everything that decides the bytes of a batch, by name. excluded: default: those of data.exclude."""
    excluded = Excluded.read(config.data) if excluded is None else excluded
    data = config.data
    plan = {
        "version": PLAN_VERSION,
        "order": config_to_tree(data.order),
        "augment": config_to_tree(data.augment),
        "on_bad_sample": data.on_bad_sample,
    }
    if excluded.names:  # in `plan`, which every loader has, so that one without a file differs from one with it
        plan["exclude"] = excluded.fingerprint()
    manifests = {
        f"manifest/{split}/{entry}": manifest.fingerprint
        for split, entries in prepared.entries.items()
        for entry, manifest in entries.items()
    }
    files = {
        f"files/{split}/{entry}": manifest.files_fingerprint
        for split, entries in prepared.entries.items()
        for entry, manifest in entries.items()
        if manifest.files_fingerprint
    }
    datasets = make_datasets(data)
    parts = processor.fingerprints()
    return {
        **parts,
        "image_libraries": image_libraries(parts["image_libraries"], config.loader),
        "order": order_fingerprint(data),
        "plan": fingerprint(plan),
        **({"exclude": excluded.fingerprint()} if excluded.names else {}),
        "dataset": fingerprint([dataset_settings(dataset.config) for dataset in datasets]),
        **read_fingerprints([dataset.read_identity() for dataset in datasets]),
        **manifests,
        **files,
    }


def dataset_settings(data: DataConfig) -> dict[str, Any]:
    """Settings behind the fingerprint `dataset`. What decides samples is in `BaseSFTDataset.read_identity`, and in `read`."""
    return {
        "dataset_type": data.dataset_type,
        "options": data.options,
        "chunk": data.action.chunk,
        "drop_noops": data.action.drop_noops,
        "depth": data.image.depth,
    }


def read_fingerprints(identities: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """`read`: all that decides what the sources read; `read/<key>`: the same by key, so that a refusal names what differs.

    identities: `BaseSFTDataset.read_identity` of each source. The manifests hold the same, but loaders of different entries
    have no manifest in common."""
    keys = sorted(
        {key for identity in identities for key in identity} | {"learn_padding"}
    )  # which stands there if false
    by_key = {f"read/{key}": fingerprint([identity.get(key) for identity in identities]) for key in keys}
    return {"read": fingerprint(list(identities)), **by_key}


def describe(prepared: Prepared, processor: Processor, fingerprints: dict[str, str]) -> str:
    """The facts of the start-up line."""
    parts = []
    for split, entries in prepared.entries.items():
        manifests = entries.values()
        shards, records, samples = (
            (
                sum(values)
                for values in zip(
                    *((len(m.held_shards()), m.num_records, m.total_samples) for m in manifests), strict=True
                )
            )
            if entries
            else (0, 0, 0)
        )
        cut = sum(len(m.shards) for m in manifests if m.held is not None)
        of = f" of {cut} shards of entries held in part" if cut else ""
        parts.append(f"{split}: {shards} shards{of} {records} records {samples} samples")
    # Files behind a URL have no fingerprint of their own: the line is the same for a data set and its copy.
    shown = {name: value for name, value in fingerprints.items() if not name.startswith("files/")}
    codec = f"{processor.codec.name}/{processor.codec.fingerprint[:8]}" if processor.codec else "none"
    return f"| {' | '.join(parts)} | codec {codec} | fingerprint {fingerprint(shown)[:12]}"


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
