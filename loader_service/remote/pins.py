"""Copies that are being read are pinned: they are not removed. Also limits how many threads work while others wait for files."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_MAX_PINS = 256  # of one block
_KEPT_PINS = 64  # of callers that do not say when they are done
_SLOT_WAIT_S = 1.0


class Pins:
    """Shared locks on copies, held until a block of code ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = _Thread()
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._slots: threading.Semaphore | None = None

    def limit_work(self, slots: int) -> None:
        """At most `slots` threads are inside `reading` without being inside `waiting`."""
        self._slots = threading.Semaphore(slots)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Pins that this thread takes in the block are held until its end. An inner block is a part of the outer one."""
        if self._thread.pins is not None:
            yield
            return
        pins = self._thread.pins = {}
        try:
            if self._slots is not None:
                self._slots.acquire()
                self._thread.has_slot = True
            yield
        finally:
            if self._slots is not None and self._thread.has_slot:
                self._slots.release()
            self._thread.pins, self._thread.has_slot = None, False
            for descriptor in pins.values():
                os.close(descriptor)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Give the slot to another thread while this one waits."""
        if not self._thread.has_slot or self._slots is None:
            yield
            return
        self._slots.release()
        self._thread.has_slot = False
        try:
            yield
        finally:
            # With a deadline: the holder of the slot may wait for a lock that a dataset class holds around this fetch.
            self._thread.has_slot = self._slots.acquire(timeout=_SLOT_WAIT_S)

    def __contains__(self, path: str) -> bool:
        pins = self._thread.pins
        return path in (self._kept if pins is None else pins)

    def keep(self, path: str, descriptor: int) -> None:
        """Hold a descriptor of `pin` until this thread's block ends; outside of a block, until newer ones replace it."""
        pins = self._thread.pins
        if pins is not None:
            pins[path] = descriptor
            if len(pins) > _MAX_PINS:  # the first is the shard; a scan may open any number of files
                os.close(pins.pop(next(itertools.islice(pins, 1, None))))
            return
        with self._lock:
            before = self._kept.get(path)
            self._kept[path] = descriptor
            if before is not None:
                os.close(before)
            if len(self._kept) > _KEPT_PINS:
                os.close(self._kept.popitem(last=False)[1])


def pin(path: str) -> int | None:
    """A descriptor with a shared lock on the file; None if there is no file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(
            descriptor, fcntl.LOCK_SH
        )  # waits: an exclusive lock is held only while a copy is renamed or removed
    except OSError as error:
        logger.debug("%s cannot be locked (%s)", path, error.strerror)
    if os.fstat(descriptor).st_nlink == 0:
        os.close(descriptor)
        return None
    return descriptor


class _Thread(threading.local):
    pins: dict[str, int] | None = None
    has_slot = False
