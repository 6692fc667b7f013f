"""`--metrics` and `--health`: pages that operators' programs read."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from loader_service.server.health import Health
from loader_service.server.server import LoaderServer
from stoker_proto.fleet.metrics import CONTENT_TYPE, exposition, import_client
from stoker_proto.fleet.pages import Page, Pages
from stoker_proto.host.systemd import Notifier

logger = logging.getLogger(__name__)

_LOOP_DEADLINE_S = 2.0
"""A loop that does not come to a call in this time hangs, or the host is out of CPU."""


class OperatorPages:
    """Listens from the start, so that a port in use is an error at once, and a loader that prepares its data counts as live."""

    def __init__(self, *, metrics: str | None, health: str | None) -> None:
        """HOST:PORT of each, perhaps the same one; None: no such page. Raises ConfigError."""
        self.health = Health(Notifier(os.environ))
        self._server: LoaderServer | None = None
        self._listening: list[Pages] = []
        wanted: dict[str, dict[str, Callable[[], Page]]] = {}
        flags: dict[str, str] = {}
        if metrics is not None:
            import_client()
            wanted[metrics], flags[metrics] = {"/metrics": self._answer_metrics}, "--metrics"
        if health is not None:
            wanted.setdefault(health, {}).update({"/livez": self.health.live, "/readyz": self.health.ready})
            flags.setdefault(health, "--health")
        try:
            for address, pages in wanted.items():
                self._listening.append(Pages(pages))
                at = self._listening[-1].start(address, flags[address])
                logger.info("%s at http://%s", " ".join(pages), at)
        except BaseException:
            self.close()
            raise

    def serve(self, server: LoaderServer, address: str) -> None:
        """The loader is bound and serves from now on."""
        self._server = server
        server.on_look = lambda: self.health.turned(draining=server.is_draining)
        self.health.serving(address)

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        for pages in self._listening:
            pages.close()

    def _answer_metrics(self) -> Page:
        if self._server is None:
            return Page(503, "the data is being prepared\n")
        try:
            samples = self._server.calls.call(self._server.metrics, _LOOP_DEADLINE_S)
        except TimeoutError:
            return Page(503, f"the serving loop did not answer within {_LOOP_DEADLINE_S:.0f} s\n")
        return Page(200, exposition(samples), CONTENT_TYPE)
