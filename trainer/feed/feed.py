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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from stoker_proto.config import Config, check_batch_arithmetic
from stoker_proto.errors import ConfigError, LocalProtocolError, RefusedError
from stoker_proto.order.lanes import order_fingerprint
from stoker_proto.wire.keys import rank_keys
from stoker_proto.wire.messages import Piece
from trainer.feed.batch import Allocate, BatchBuilder, Decoder, MicroBatch, StepBatch, plain_memory
from trainer.feed.client.core import Core
from trainer.feed.client.fleet import State
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.schedule import num_steps
from trainer.feed.client.tickets import TicketCounters
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
    """Of all that a batch means: keep them in the checkpoint and hand them in again as `pins`; equal on all ranks."""
    num_samples: int
    """Samples of the split in the epoch that `connect` asked for."""
    source_samples: tuple[int, ...]
    """Of these, those of each source."""
    pass_samples: tuple[int, ...]
    """Of one pass over each source: more or fewer than an epoch has of it, where sources have weights."""
    loaders: dict[str, str]
    """Address -> incarnation name of the loaders that are ready."""


class Feed:
    """One rank's stream of micro-batches of one split. Not for use from several threads."""

    def __init__(
        self,
        config: Config,
        split: Literal["train", "val"],
        rank: int,
        world_size: int,
        *,
        pins: Mapping[str, str] | None = None,
        processor: Decoder | None = None,
        allocate: Allocate = plain_memory,
        num_epochs: int | None = None,
        digests: bool = True,
        decode_threads: int = 1,
    ) -> None:
        """Nothing is connected yet. Raises ConfigError.

        pins: fingerprints that the loaders must have (FeedInfo.fingerprints of the run that is resumed).
        processor: decodes images; default: made from what the loaders send.
        allocate: makes the arrays of the batches, e.g. in pinned memory.
        num_epochs: epochs are prefetched across their border up to this one; default: trainer.epochs, for `val` one.
        """
        paths = config.data.paths(split)
        if not paths:
            raise ConfigError(f"the config names no {split} data (data.{split}_data_paths, or paths of data.sources)")
        trainer = config.trainer
        passes = check_batch_arithmetic(trainer.global_batch_size, trainer.micro_batch_size, world_size)
        self.config, self.split, self.rank, self.world_size = config, split, rank, world_size
        self._passes, self.global_batch_size = passes, trainer.global_batch_size
        self._num_epochs = num_epochs or (trainer.epochs if split == "train" else 1)
        self._processor, self._processor_json = processor, ""
        self._allocate, self._digests = allocate, digests
        self._builder: BatchBuilder | None = None
        self._builder_lock, self._pause = threading.Lock(), threading.Event()
        options = CoreOptions(
            split=split,
            entries=tuple(f"{config.data.path_key(split, n)} ({path})" for n, path in enumerate(paths)),
            sources=config.data.entry_sources(split),
            source_names=config.data.source_names(),
            weights=config.data.weights if split == "train" else (),
            weigh_by=config.data.weigh_by,
            addresses=config.cluster.loader_addresses,
            rank=rank,
            world_size=world_size,
            client=secrets.token_hex(8),
            fingerprints={**({} if processor else _config_pins(config)), **_order_pins(config, pins or {})},
            order=config.data.order,
            feed=trainer.feed,
            global_batch_size=trainer.global_batch_size,
            micro_batch_size=trainer.micro_batch_size,
            window=max(trainer.feed.prefetch, passes + 1),  # `steps` hands over whole steps: the next must fit in
        )
        keys = rank_keys(config.cluster.security)
        self._prefetcher = Prefetcher(self._build, decode_threads)
        self._driver = SocketDriver(options, self._prefetcher, keys)
        self._session = 0
        self._at: tuple[int, int] | None = None  # epoch and sample of the next step of the running session
        self.first_batch_at: float | None = None
        """`time.monotonic()` when the first micro-batch was there."""

    def connect(self, epoch: int = 0) -> FeedInfo:
        """Wait for loaders that together hold all the data, and for the lengths of an epoch.

        Raises DeadlineError (nobody there, data missing) or RefusedError (a loader differs from this run or another loader).
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
        """The run has begun, with this split or another: a loader that joins and differs is left out, and ends it no more.

        `steps` says so too; a split that is read later needs to hear of it before.
        """
        self._driver.post(lambda core, now: core.begin())

    def steps(self, epoch: int, first_sample: int) -> Iterator[StepBatch]:
        """This rank's part of the epoch's global batches from a stream position on; after `connect`.

        The next epoch is fetched ahead at the end of this one. Going on where the last call left costs nothing; going
        anywhere else drops what was fetched ahead. Raises DataError (bad data), DeadlineError (no data in time).
        """
        size = self.global_batch_size
        if self._at != (epoch, first_sample):
            self._start(epoch, first_sample)
        total = self._prefetcher.epoch(epoch).num_samples
        steps = num_steps(total, first_sample, size)
        for step in range(steps):
            first = first_sample + step * size
            last = min(first + size, total)
            self._at = None  # should this step fail, there is nothing to go on from
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
        """What decodes the images; after `connect`."""
        return self._get_builder().decoder

    def progress(self, *, fresh_within_s: float = 0.0) -> dict[str, dict[str, float]]:
        """Address -> counters of its last PONG (PROTOCOL.md lists them); fresh_within_s > 0: ask now, wait so long."""
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
        """Address -> counters of its first PONG, from before it worked for this feed."""
        loaders = self._driver.call(lambda core, now: list(core.fleet.loaders))
        return {loader.address: dict(loader.first_progress) for loader in loaders if loader.first_progress}

    def counters(self) -> TicketCounters:
        """Tickets, and what it took to have them answered, since the start."""
        return self._driver.call(lambda core, now: dataclasses.replace(core.tickets.counters))

    @property
    def bytes_received(self) -> int:
        """Of all frames so far."""
        return self._driver.bytes_received

    @property
    def num_ready(self) -> int:
        """Micro-batches that lie ready or are being decoded: the queue's depth."""
        return self._prefetcher.num_ready

    def close(self) -> None:
        """Close sockets and threads; safe to call twice, and after Ctrl-C."""
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
        return self._get_builder()(pieces)

    def _get_builder(self) -> BatchBuilder:
        with self._builder_lock:
            if self._builder is None:
                self._builder = BatchBuilder(
                    decoder=self._processor or _processor_of(self.config, self._processor_json),
                    num_rows=self.config.trainer.micro_batch_size,
                    max_tokens=self.config.data.max_seq_len,
                    allocate=self._allocate,
                    digests=self._digests,
                    packing=self.config.data.packing,
                )
            return self._builder


def _processor_of(config: Config, processor_json: str) -> Decoder:
    """One object for all feeds of this process that are sent the same."""
    with _PROCESSORS_LOCK:
        key = (config.model.base_model_path, processor_json)
        if key not in _PROCESSORS:
            from stoker_proto.processor import Processor  # here: a feed with a processor of its own needs no tokenizers

            _PROCESSORS.clear()
            _PROCESSORS[key] = Processor.from_json(processor_json, Path(key[0]) / "tokenizer.json")
        return _PROCESSORS[key]


def _config_pins(config: Config) -> dict[str, str]:
    """What this rank's own config and model folder say of a row. Codec and data are the loaders' to know. ConfigError."""
    from stoker_proto.processor import Processor  # here: a feed with a processor of its own needs no tokenizers

    fingerprints = Processor.build(config, None).fingerprints()
    return {name: fingerprints[name] for name in ("tokenizer", "image", "dialogue")}


def _order_pins(config: Config, pins: Mapping[str, str]) -> dict[str, str]:
    """The pins of a checkpoint, and the order that the config says. Raises RefusedError if these differ."""
    order = order_fingerprint(config.data)
    if pins.get("order", order) != order:
        raise RefusedError(
            "data.order, the sources or their weights are not those of the checkpoint, or its rows were packed or grouped "
            "otherwise, so its position means another row: set them back, or start anew with trainer.checkpoint.resume=null"
        )
    return {**pins, "order": order}
