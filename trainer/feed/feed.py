"""`Feed`: what the trainer and `loader-bench` use. Connect, iterate over steps, close.

feed = Feed(config, "train", rank, world_size)
info = feed.connect()
for batch in feed.steps(epoch, first_sample):     # StepBatch: this rank's micro-batches of one optimizer step
    train(batch.micro_batches); save_cursor(batch.epoch, batch.next_sample)
feed.close()
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from stoker_proto.config import Config, check_batch_arithmetic
from stoker_proto.errors import ConfigError, LocalProtocolError, RefusedError
from stoker_proto.host.hub_cache import find_model_folder
from stoker_proto.order.lanes import order_fingerprint
from stoker_proto.wire.keys import rank_keys
from stoker_proto.wire.messages import Piece
from trainer.feed.batch import BatchBuilder, Decoder, Decoding, MicroBatch, StepBatch
from trainer.feed.buffers import keep_freed_frames
from trainer.feed.client.core import Core
from trainer.feed.client.fleet import State
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.pace import NO_LANES
from trainer.feed.client.schedule import num_steps
from trainer.feed.client.tickets import TicketCounters
from trainer.feed.discovery import is_fixed
from trainer.feed.prefetch import Prefetcher
from trainer.feed.sockets import SocketDriver

_PROCESSORS: dict[tuple[str, str], Decoder] = {}
_PROCESSORS_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedInfo:
    """What `Feed.connect` learned from the loaders."""

    processor_json: str
    """`stoker_proto.processor.Processor.to_json()` of the loaders."""
    fingerprints: dict[str, str]
    """Fingerprints of what a batch means, equal on all ranks. The checkpoint keeps them; a resume passes them as `pins`."""
    num_samples: int
    """Samples of the split in the epoch that `connect` asked for."""
    source_samples: tuple[int, ...]
    """Samples of each source in that epoch."""
    pass_samples: tuple[int, ...]
    """Samples of one pass over each source. With weights, an epoch may have more or fewer of a source."""
    loaders: dict[str, str]
    """Address -> incarnation name of each ready loader."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenLoader:
    """One loader, as this rank knows it now."""

    address: str
    is_ready: bool
    share: float
    """Of its lanes: 1, a half, a quarter ... 0."""
    latency_s: float | None
    """Median of its last answers; None: too few so far."""
    samples: int
    """That this rank had of it."""
    num_open: int
    """Tickets that it has not answered."""
    progress: dict[str, float]
    """Counters of its last PONG (PROTOCOL.md lists them)."""


class Feed:
    """One rank's stream of micro-batches of one split. Not thread-safe."""

    def __init__(
        self,
        config: Config,
        split: Literal["train", "val"],
        rank: int,
        world_size: int,
        *,
        pins: Mapping[str, str] | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008 - immutable
    ) -> None:
        """Does not connect yet. Raises ConfigError, RefusedError.

        At the end of an epoch of `train` the feed fetches the next one ahead, up to `trainer.epochs`.

        pins: fingerprints that the loaders must have: FeedInfo.fingerprints of the run to resume.
        """
        paths = config.data.paths(split)
        if not paths:
            raise ConfigError(f"the config names no {split} data (data.{split}_data_paths, or paths of data.sources)")
        trainer = config.trainer
        passes = check_batch_arithmetic(trainer.global_batch_size, trainer.micro_batch_size, world_size)
        self.config, self.split, self.rank, self.world_size = config, split, rank, world_size
        self._passes, self.global_batch_size = passes, trainer.global_batch_size
        self._num_epochs = trainer.epochs if split == "train" else 1
        self._decoding, self._processor_json = decoding, ""
        self._builder: BatchBuilder | None = None
        self._copy: Callable[[MicroBatch], Any] | None = None
        self._builder_lock, self._pause = threading.Lock(), threading.Event()
        listed = config.cluster.loader_addresses
        options = CoreOptions(
            split=split,
            entries=tuple(f"{config.data.path_key(split, n)} ({path})" for n, path in enumerate(paths)),
            sources=config.data.entry_sources(split),
            source_names=config.data.source_names(),
            weights=config.data.weights if split == "train" else (),
            weigh_by=config.data.weigh_by,
            addresses=tuple(filter(is_fixed, listed)),
            rank=rank,
            world_size=world_size,
            client=secrets.token_hex(8),
            fingerprints={**({} if decoding.processor else _config_pins(config)), **_order_pins(config, pins or {})},
            order=config.data.order,
            feed=trainer.feed,
            global_batch_size=trainer.global_batch_size,
            micro_batch_size=trainer.micro_batch_size,
            window=max(trainer.feed.prefetch, passes + 1),  # `steps` yields whole steps: the next one must fit too
        )
        if config.data.image.transport == "pixels":
            keep_freed_frames()
        keys = rank_keys(config.cluster.security)
        self._prefetcher = Prefetcher(self._build, decoding.threads)
        self._driver = SocketDriver(options, self._prefetcher, keys, [entry for entry in listed if not is_fixed(entry)])
        self._session = 0
        self._at: tuple[int, int] | None = None  # epoch and sample of the next step of the running session
        self.first_batch_at: float | None = None
        """`time.monotonic()` when the first micro-batch was ready."""

    def connect(self, epoch: int = 0) -> FeedInfo:
        """Wait for loaders that together hold all the data, and for the length of an epoch.

        Raises DeadlineError (no loader answers, or data is missing) or RefusedError (a loader differs from this run).
        """
        self._driver.start()
        self._driver.post(lambda core, now: core.open(epoch, now))
        opened = self._prefetcher.epoch(epoch)

        def look(core: Core, now: float) -> tuple[str, dict[str, str], dict[str, str]]:
            ready = [loader for loader in core.fleet.loaders if loader.state is State.READY]
            return core.fleet.processor, core.fleet.fingerprints(), {loader.address: loader.name for loader in ready}

        self._processor_json, fingerprints, loaders = self._driver.call(look)
        self._prefetcher.warm_up(self._get_builder)
        return FeedInfo(
            processor_json=self._processor_json,
            fingerprints=fingerprints,
            num_samples=opened.num_samples,
            source_samples=opened.source_samples,
            pass_samples=opened.pass_samples,
            loaders=loaders,
        )

    def begin(self) -> None:
        """Training has begun: from now on a loader that joins and differs is left out and does not end the run.

        `steps` calls this too. Call it for a split that is read later, such as validation, when training begins.
        """
        self._driver.post(lambda core, now: core.begin())

    def steps(self, epoch: int, first_sample: int) -> Iterator[StepBatch]:
        """This rank's part of the epoch's global batches, from a stream position on. Call `connect` first.

        The next epoch is fetched ahead at the end of this one. To continue where the last call ended costs nothing; any other
        position drops what was fetched ahead. Raises DataError (bad data), DeadlineError (no data in time).
        """
        size = self.global_batch_size
        if self._at != (epoch, first_sample):
            self._start(epoch, first_sample)
        total = self._prefetcher.epoch(epoch).num_samples
        steps = num_steps(total, first_sample, size)
        for step in range(steps):
            first = first_sample + step * size
            last = min(first + size, total)
            self._at = None  # if this step fails, there is no position to continue from
            micro_batches, wait_s = self._take_step(epoch, first, total)
            if last < total:
                self._at = (epoch, last)
            elif epoch + 1 < self._num_epochs:
                self._at = (epoch + 1, 0)
            yield StepBatch(
                micro_batches=micro_batches,
                wait_s=wait_s,
                epoch=epoch,
                step=step,
                num_steps=steps,
                first_sample=first,
                next_sample=last,
            )

    def _take_step(self, epoch: int, first: int, total: int) -> tuple[list[MicroBatch], float]:
        micro_batches, wait_s = [], 0.0
        size = self.config.trainer.micro_batch_size
        session = self._session
        for index in range(self._passes):
            slice_, batch, waited_s = self._prefetcher.take()
            self._driver.post(lambda core, now: core.taken(session))
            if self.first_batch_at is None:
                self.first_batch_at = time.monotonic()
            due = min(first + (index * self.world_size + self.rank) * size, total)
            if (slice_.epoch, slice_.start) != (epoch, due) or batch.num_rows != slice_.num_rows:
                raise LocalProtocolError(
                    f"{slice_} with {batch.num_rows} rows came where epoch {epoch}, sample {due} is due"
                )
            micro_batches.append(batch)
            wait_s += waited_s
        return micro_batches, wait_s

    def _start(self, epoch: int, first_sample: int) -> None:
        self._session += 1
        session, num_epochs = self._session, self._num_epochs
        self._prefetcher.begin(session, epoch)
        self._driver.post(lambda core, now: core.start(session, epoch, first_sample, num_epochs, now))

    @property
    def processor(self) -> Decoder:
        """The object that decodes images. Call `connect` first."""
        return self._get_builder().decoder

    def progress(self, *, fresh_within_s: float = 0.0) -> dict[str, dict[str, float]]:
        """Address -> counters of its last PONG (PROTOCOL.md lists them). fresh_within_s > 0: PING first, and wait so long."""
        awaited: dict[int, int] = self._driver.call(lambda core, now: core.ping(now)) if fresh_within_s else {}
        deadline = time.monotonic() + fresh_within_s
        while True:
            loaders = self._driver.call(lambda core, now: list(core.fleet.loaders))
            if all(loaders[number].pong_nonce >= nonce for number, nonce in awaited.items()):
                break
            if time.monotonic() > deadline:
                break
            self._pause.wait(0.005)
        return {loader.address: dict(loader.progress) for loader in loaders if loader.progress}

    def first_progress(self) -> dict[str, dict[str, float]]:
        """Address -> counters of its first PONG, from before its first ticket of this feed."""
        loaders = self._driver.call(lambda core, now: list(core.fleet.loaders))
        return {loader.address: dict(loader.first_progress) for loader in loaders if loader.first_progress}

    def loaders(self) -> list[SeenLoader]:
        """All loaders that are listed, ready or not."""

        def look(core: Core, now: float) -> list[SeenLoader]:
            pace, found = core.pace, []
            for number, loader in enumerate(core.fleet.loaders):
                if loader.state is not State.LEFT:
                    level, latency = pace.shares.level(number, now), pace.latencies.of[number]
                    found.append(
                        SeenLoader(
                            address=loader.address,
                            is_ready=loader.state is State.READY,
                            share=0.0 if level >= NO_LANES else 0.5**level,
                            latency_s=latency.middle if latency.known else None,
                            samples=pace.samples[number],
                            num_open=pace.load.of[number].num_open,
                            progress=dict(loader.progress),
                        )
                    )
            return found

        return self._driver.call(look)

    def counters(self) -> TicketCounters:
        """Counts of tickets, repeats and hedges since the start."""
        return self._driver.call(lambda core, now: dataclasses.replace(core.tickets.counters))

    def copy_ahead(self, copy: Callable[[MicroBatch], Any]) -> None:
        """From now on call this with each micro-batch, on its decode thread; what it returns is `MicroBatch.on_device`."""
        self._copy = copy

    @property
    def bytes_received(self) -> int:
        """Bytes of all frames so far."""
        return self._driver.bytes_received

    @property
    def num_ready(self) -> int:
        """Micro-batches that are decoded or being decoded: the queue's depth."""
        return self._prefetcher.num_ready

    def close(self) -> None:
        """Close sockets and threads. Safe to call twice, and after Ctrl-C."""
        self._driver.close()
        self._prefetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- on the decode threads

    def _build(self, pieces: Sequence[Piece]) -> MicroBatch:
        batch = self._get_builder()(pieces)
        copy = self._copy
        if copy is not None:
            batch.on_device = copy(batch)
        return batch

    def _get_builder(self) -> BatchBuilder:
        with self._builder_lock:
            if self._builder is None:
                self._builder = BatchBuilder(
                    decoder=self._decoding.processor or _processor_of(self.config, self._processor_json),
                    num_rows=self.config.trainer.micro_batch_size,
                    max_tokens=self.config.data.max_seq_len,
                    allocate=self._decoding.allocate,
                    packing=self.config.data.packing,
                )
            return self._builder


def _processor_of(config: Config, processor_json: str) -> Decoder:
    """The processor from the loaders' JSON; one object for all feeds of this process with the same JSON."""
    with _PROCESSORS_LOCK:
        key = (str(find_model_folder(config.model.base_model_path)), processor_json)
        if key not in _PROCESSORS:
            from stoker_proto.processor import (
                Processor,  # imported here: a feed with its own processor needs no tokenizers
            )

            _PROCESSORS.clear()
            _PROCESSORS[key] = Processor.from_json(processor_json, Path(key[0]) / "tokenizer.json")
        return _PROCESSORS[key]


def _config_pins(config: Config) -> dict[str, str]:
    """Fingerprints of rows from this rank's config and model folder; only loaders know codec and data. Raises ConfigError."""
    from stoker_proto.processor import Processor  # imported here: a feed with its own processor needs no tokenizers

    fingerprints = Processor.build(config, None).fingerprints()
    return {name: fingerprints[name] for name in ("tokenizer", "image", "dialogue")}


def _order_pins(config: Config, pins: Mapping[str, str]) -> dict[str, str]:
    """The pins of a checkpoint and the fingerprint of the config's order. Raises RefusedError if they contradict each other."""
    order = order_fingerprint(config.data)
    if pins.get("order", order) != order:
        raise RefusedError(
            "data.order, the sources or their weights are not those of the checkpoint, or its rows were packed or grouped "
            "otherwise, so its position means another row: set them back, or start anew with trainer.checkpoint.resume=null"
        )
    return {**pins, "order": order}
