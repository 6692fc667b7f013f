"""`--metrics`: pages that operators' programs read, answered by the serving loop."""

from __future__ import annotations

import logging

from loader_service.server.server import LoaderServer
from stoker_proto.fleet.metrics import CONTENT_TYPE, exposition, import_client
from stoker_proto.fleet.pages import Page, Pages

logger = logging.getLogger(__name__)

_LOOP_DEADLINE_S = 2.0
"""A loop that does not come to a call in this time hangs, or the host is out of CPU."""


class OperatorPages:
    """Listens from the start, so that a port in use is an error at once; has something to say when `serve` was called."""

    def __init__(self, metrics: str | None) -> None:
        """metrics: HOST:PORT, or None for no such page. Raises ConfigError."""
        self._server: LoaderServer | None = None
        self._metrics = Pages({"/metrics": self._answer_metrics})
        if metrics is not None:
            import_client()
            logger.info("metrics at http://%s/metrics", self._metrics.start(metrics, "--metrics"))

    def serve(self, server: LoaderServer) -> None:
        """The loader serves from now on."""
        self._server = server

    def close(self) -> None:
        """Stop listening."""
        self._metrics.close()

    def _answer_metrics(self) -> Page:
        if self._server is None:
            return Page(503, "the data is being prepared\n")
        try:
            samples = self._server.calls.call(self._server.metrics, _LOOP_DEADLINE_S)
        except TimeoutError:
            return Page(503, f"the serving loop did not answer within {_LOOP_DEADLINE_S:.0f} s\n")
        return Page(200, exposition(samples), CONTENT_TYPE)
