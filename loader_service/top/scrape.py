"""`/metrics` pages -> figures of one moment. Programs that do not answer are part of the result."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from stoker_proto.fleet.metrics import parse

_DEADLINE_S = 5.0
_MOST_BYTES = 8 << 20
_AT_ONCE = 32

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A fleet's own addresses are no matter of a proxy, whatever `http_proxy` says; it would answer for them that it cannot."""

Samples = Mapping[str, Mapping[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """One program at one moment."""

    address: str
    at: float
    """Seconds of a monotonic clock."""
    samples: Samples = field(default_factory=dict)
    error: str = ""
    """Why there are none."""

    @property
    def is_loader(self) -> bool:
        """Whether it is a loader that answered."""
        return "stoker_loader_info" in self.samples

    @property
    def is_trainer(self) -> bool:
        """Whether it is a trainer that answered."""
        return "stoker_trainer_info" in self.samples

    def value(self, name: str) -> float:
        """Of a metric without labels; 0 where it is missing."""
        return self.samples.get(name, {}).get((), 0.0)

    def labelled(self, name: str) -> dict[str, float]:
        """Of a metric with one label: its value -> the metric's."""
        return {labels[0]: value for labels, value in self.samples.get(name, {}).items()}


def scrape_all(addresses: Sequence[str]) -> list[Scrape]:
    """All of them at once, in their order; each answers within some seconds or counts as gone."""
    with ThreadPoolExecutor(min(len(addresses), _AT_ONCE) or 1) as pool:
        return list(pool.map(scrape, addresses))


def scrape(address: str) -> Scrape:
    """The page of HOST:PORT."""
    try:
        with _DIRECT.open(f"http://{address}/metrics", timeout=_DEADLINE_S) as answer:
            text = answer.read(_MOST_BYTES).decode()
        samples = parse(text)
    except urllib.error.HTTPError as error:
        reason = error.read(200).decode(errors="replace").strip() or str(error)
        error.close()
        return Scrape(address=address, at=time.monotonic(), error=reason)
    except (OSError, http.client.HTTPException, ValueError) as error:
        inner = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = (inner.strerror if isinstance(inner, OSError) else None) or str(inner)
        return Scrape(address=address, at=time.monotonic(), error=reason)
    found = Scrape(address=address, at=time.monotonic(), samples=samples)
    if not (found.is_loader or found.is_trainer):
        return Scrape(
            address=address, at=found.at, error="it answers, but not with the metrics of a loader or a trainer"
        )
    return found
