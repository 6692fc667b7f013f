"""Whether a loader lives and is ready: one answer for `/livez`, `/readyz` and systemd.

    preparing  -> the data is read; nothing is served yet            live, not ready
    serving    -> bound, and the loop runs                           live and ready     READY=1, then WATCHDOG=1
    draining   -> it answers what it has, and takes no new tickets   live, not ready    STOPPING=1

A serving loop without a turn for `stalled_s` is neither live nor ready, and feeds no watchdog.
"""

from __future__ import annotations

import time

from stoker_proto.fleet.pages import Page
from stoker_proto.host.systemd import Notifier

STALLED_S = 30.0
"""The loop makes five turns a second. A host without free CPU slows it down, but not to this."""


class Health:
    """The loop calls `serving` and `turned`; other threads ask `live` and `ready`."""

    def __init__(self, notifier: Notifier, stalled_s: float = STALLED_S) -> None:
        self._notifier, self._stalled_s = notifier, stalled_s
        self._turned_at: float | None = None  # None: preparing
        self._told_at = 0.0
        self._draining = False

    def serving(self, address: str) -> None:
        """The loader is bound, and its loop begins."""
        self._turned_at = self._told_at = time.monotonic()
        self._notifier.send("READY=1", f"STATUS=serving at {address}")

    def turned(self, *, draining: bool) -> None:
        """The loop came round."""
        self._turned_at = now = time.monotonic()
        if draining and not self._draining:
            self._draining = True
            self._notifier.send("STOPPING=1", "STATUS=draining")
        watchdog_s = self._notifier.watchdog_s
        if watchdog_s is not None and now >= self._told_at + watchdog_s / 4:
            self._told_at = now
            self._notifier.send("WATCHDOG=1")

    def live(self) -> Page:
        """200, or 503 once the loop hangs."""
        return self._stalled() or Page(200, "live\n")

    def ready(self) -> Page:
        """200 while it takes tickets, else 503 with the reason."""
        if self._turned_at is None:
            return Page(503, "not ready: the data is being prepared\n")
        return self._stalled() or (Page(503, "not ready: it drains\n") if self._draining else Page(200, "ready\n"))

    def _stalled(self) -> Page | None:
        if self._turned_at is None or (ago := time.monotonic() - self._turned_at) < self._stalled_s:
            return None
        return Page(503, f"the serving loop has not come round for {ago:.0f} s\n")
