"""Tickets -> frames inside one process: config, manifests, plans, builder threads, and a queue of answers.

A worker process has one. A loader that is small enough to need no worker processes has one itself.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import threading
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

from loader_service.disk_cache.folder import disk_cache_bytes, disk_cache_folder
from loader_service.disk_cache.store import DiskCache
from loader_service.manifest import EntryManifest, NamedEntry, load_manifest
from loader_service.pieces.builder import Counters, PieceBuilder
from loader_service.pieces.caching_encoder import CachingEncoder
from loader_service.pieces.encoder import RecordEncoder
from loader_service.pieces.excluded import Excluded
from loader_service.plan.lane_plan import LanePlan, PlanKey
from loader_service.plan.plan_files import load_plan, plan_exists
from loader_service.remote.shared_store import remote_store
from stoker_proto.config import Config
from stoker_proto.config.reader import config_from_tree
from stoker_proto.errors import StokerError
from stoker_proto.host.trouble import host_error
from stoker_proto.processor import Processor
from stoker_proto.wire import encoding
from stoker_proto.wire.messages import Failure, Ticket

logger = logging.getLogger(__name__)

CLOSE_DEADLINE_S = 5.0
"""How long threads may finish their work at the end. A worker process is killed before, so this is for the inline pool."""
_KEEP_PLANS = 8  # over splits, epochs and entries; one is a pair of mapped files
_MAX_WAITING_BYTES = 32 << 20  # of answers not yet taken; builder threads wait rather than build more


class PieceService:
    """Reads its job from the run directory. `submit` tickets, wait until `readable` is ready, `take` the answers."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        job = json.loads((run_dir / "job.json").read_text())
        self._config: Config = config_from_tree(job["config"])
        self._manifests: dict[tuple[str, int], EntryManifest] = {}
        for item in job["manifests"]:
            folder = Path(item.pop("folder"))
            lists: dict[str, Any] = {"shards": tuple(item["shards"]), "stamps": tuple(map(tuple, item["stamps"]))}
            lists["held"] = None if item["held"] is None else frozenset(item["held"])
            manifest = load_manifest(folder, NamedEntry(**{**item, **lists}))
            self._manifests[manifest.split, manifest.entry] = manifest
        if (store := remote_store(self._config.data)) is not None:
            store.expect(job["remote"])
        self._plans: OrderedDict[PlanKey, LanePlan] = OrderedDict()
        self._out: deque[tuple[bytes, bytes]] = deque()
        self._waiting_bytes = 0  # of `_out`
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._num_held_back = 0
        """Threads that wait for room."""
        self._closed = False
        self.readable, self._wakeup = os.pipe2(os.O_CLOEXEC)
        """File descriptor that a poller may watch for answers."""
        self._owner = threading.get_ident()
        excluded = Excluded.from_json(job["exclude"])
        encoder, self._disk = _encoder(self._config, Processor.load(run_dir), excluded)
        encoder.preload(self._manifests.values())
        self._builder = PieceBuilder(
            encoder,
            job["loader"],
            self._deliver,
            threads=encoder.share_work(job["threads"]),
            cache_bytes=(self._config.loader.cache_mb << 20) // max(1, job["workers"]),
            read_ahead=self._config.loader.read_ahead,
            disk=None if self._disk is None else self._disk.counters,
        )

    @property
    def counters(self) -> Counters:
        """Counters since the start."""
        return self._builder.counters()

    def submit(self, address: bytes, ticket: Ticket) -> None:
        """Begin the ticket's piece; its frame, or that of a FAILURE, comes out of `take`."""
        entry, lane = divmod(ticket.lane, self._config.data.order.lanes)
        try:
            plan = self._plan(PlanKey(ticket.split, ticket.epoch, entry))
        except FileNotFoundError:  # the server has dropped this plan, and makes it again when a rank asks again
            self._fail(address, ticket, "unavailable", f"the plan of {ticket.split} epoch {ticket.epoch} is made again")
            return
        except (OSError, MemoryError, RuntimeError, StokerError) as error:
            self._refuse(address, ticket, error)
            return
        try:
            self._builder.submit(
                address,
                ticket,
                self._manifests[ticket.split, entry],
                plan,
                lane,
                lambda: self._next_plan(PlanKey(ticket.split, ticket.epoch + 1, entry)),
            )
        except (OSError, MemoryError, RuntimeError, StokerError) as error:
            self._refuse(address, ticket, error)

    def _refuse(self, address: bytes, ticket: Ticket, error: Exception) -> None:
        """Answer with a FAILURE. Raises an error that is neither trouble of the host nor a StokerError: a bug."""
        trouble = host_error(error, f"the plan of {ticket.split} epoch {ticket.epoch}")
        if trouble is not None:
            logger.warning("%s", trouble)
            self._fail(address, ticket, "unavailable", str(trouble))
        elif isinstance(error, StokerError):
            self._fail(address, ticket, "rejected", str(error))
        else:
            raise error

    def _fail(self, address: bytes, ticket: Ticket, reason: str, message: str) -> None:
        self._deliver(address, encoding.encode(Failure(ticket=ticket.ticket, reason=reason, message=message)))

    def take(self) -> tuple[bytes, bytes] | None:
        """(client address, frame) of one answer, or None."""
        if not self._out:
            return None
        answer = self._out.popleft()
        with self._lock:
            self._waiting_bytes -= len(answer[1])
            if self._num_held_back:
                self._room.notify_all()
        return answer

    def acknowledge(self) -> None:
        """Call it when `readable` is ready: empties the pipe that woke the poller."""
        os.read(self.readable, 65536)

    def close(self) -> None:
        """Stop the threads; what is in work is finished first, within CLOSE_DEADLINE_S."""
        with self._lock:
            self._closed = True
            self._room.notify_all()
        if not self._builder.close(CLOSE_DEADLINE_S):
            logger.error("a read of the data still hangs after %.0f s: it is given up", CLOSE_DEADLINE_S)
            return  # that thread may yet write to the pipe, whose number must not become another file's
        if self._disk is not None:
            self._disk.close()
        os.close(self.readable)
        os.close(self._wakeup)

    def _next_plan(self, key: PlanKey) -> LanePlan | None:
        """The plan, if this epoch will be trained and is planned already; else None."""
        if key.split != "train" or (key.epoch >= self._config.trainer.epochs and not self._config.data.weights):
            return None
        if plan_exists(self._run_dir, key):
            try:
                return self._plan(key)
            except FileNotFoundError:  # the server has dropped it this moment
                return None
            except (OSError, MemoryError) as error:
                if host_error(error) is None:
                    raise
                logger.warning("not read ahead: %s", error)  # the ticket itself can be answered
        return None

    def _plan(self, key: PlanKey) -> LanePlan:
        plan = self._plans.get(key)
        if plan is None:
            manifest = self._manifests[key.split, key.entry]
            plan = self._plans[key] = load_plan(self._run_dir, manifest, self._config.data, key)
            if len(self._plans) > max(_KEEP_PLANS, 2 * len(self._manifests)):
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return plan

    def _deliver(self, address: bytes, frame: bytes) -> None:
        is_owner = threading.get_ident() == self._owner  # it takes the answers after each submit
        with self._lock:
            while not is_owner and self._waiting_bytes > _MAX_WAITING_BYTES and not self._closed:
                self._num_held_back += 1
                self._room.wait()
                self._num_held_back -= 1
            self._waiting_bytes += len(frame)
            self._out.append((address, frame))
        if not is_owner:
            os.write(self._wakeup, b"1")


def _encoder(config: Config, processor: Processor, excluded: Excluded) -> tuple[RecordEncoder, DiskCache | None]:
    """The encoder, and its cache on disk where loader.disk_cache_gb asks for one."""
    folder = disk_cache_folder(config)
    if folder is None:
        return RecordEncoder(config.data, processor, config.loader, excluded), None
    disk = DiskCache(folder, disk_cache_bytes(config))
    return CachingEncoder(config.data, processor, config.loader, excluded, disk), disk


def settle_process() -> None:
    """Settings of a process that builds pieces from now on.

    A thread that fails for another reason than bad data ends the process, which is then restarted: no ticket waits for ever. The
    garbage collector skips what was imported and read so far, because that stays until the end.
    """

    def end(failure: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(failure)
        os._exit(70)

    threading.excepthook = end
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)  # thousands of objects come and go with each turn of texts, and none is in a cycle
