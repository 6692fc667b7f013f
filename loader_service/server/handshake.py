"""HELLO -> WELCOME, or REFUSE with the differences."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from loader_service.manifest import EntryManifest
from loader_service.server.refusals import Refusals
from loader_service.server.served import Served
from stoker_proto import PROTOCOL_VERSION
from stoker_proto.wire.messages import Hello, Refuse, Welcome
from stoker_proto.wire.peer_text import plain

logger = logging.getLogger(__name__)


def missing_shards(manifests: Iterable[EntryManifest]) -> list[list[int | str]]:
    """`Welcome.missing` of a split: ranges of shards of its entries that this loader does not hold."""
    found: list[list[int | str]] = []
    for manifest in manifests:
        names = [Path(shard).name for shard in manifest.shards]
        of = len(names)
        found += [
            [manifest.entry, first, stop, of, names[first], names[stop - 1]]
            for first, stop in manifest.missing_ranges()
        ]
    return sorted(found)


_SHOWN = 200  # characters of what a rank says of itself: neither the answer nor the log grow with it


class Handshake:
    """Compares a rank's fingerprints with those of this loader."""

    def __init__(self, served: Served) -> None:
        self._fingerprints = served.fingerprints
        self._refusals = Refusals()
        config = served.config
        self._welcome = Welcome(
            protocol=PROTOCOL_VERSION,
            loader=served.name,
            fingerprints=dict(served.fingerprints),
            held={split: sorted(held) for split, held in served.entries.items()},
            missing={split: missing_shards(held.values()) for split, held in served.entries.items()},
            num_entries={split: len(config.data.paths(split)) for split in ("train", "val")},
            num_samples={
                split: sum(manifest.total_samples for manifest in held.values())
                for split, held in served.entries.items()
            },
            processor=served.processor_json,
        )

    @property
    def refused(self) -> int:
        """HELLOs that were answered with REFUSE."""
        return self._refusals.total

    def answer(self, hello: Hello) -> Welcome | Refuse:
        """WELCOME, or REFUSE with the differences."""
        differences = [
            [name, self._fingerprints[name], plain(theirs, _SHOWN)]
            for name, theirs in sorted(hello.fingerprints.items())
            if self._fingerprints.get(name, theirs) != theirs
        ]
        if hello.protocol != PROTOCOL_VERSION:
            differences.insert(0, ["protocol", str(PROTOCOL_VERSION), str(hello.protocol)])
        if not differences:
            return self._welcome
        first_name = differences[0][0]  # one of this loader's
        if self._refusals.add(first_name):
            client = plain(hello.client, _SHOWN)
            logger.warning("refused rank %d (%s): it differs in %s", hello.rank, client, differences)
        return Refuse(protocol=PROTOCOL_VERSION, differences=differences)
