"""The bad samples that `data.on_bad_sample: skip` left out: which records, and how many samples of each. Bounded in size.

{"demos/traj_3/obs.npz, record demos.jsonl:4: its end is missing ...": 4}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from trainer.engine.ranks import Ranks, gather_json

MAX_NAMED = 1000
"""Records that are named; for further records only the samples are counted."""
MAX_SHOWN = 20
_MAX_TEXT = 400


class Skipped:
    """Samples that came as rows without labels, by the loader's reason, which names file, record and field."""

    def __init__(self) -> None:
        self.named: dict[str, int] = {}
        self.unnamed = 0
        """Samples of records beyond MAX_NAMED."""

    @property
    def num_samples(self) -> int:
        """Samples of all records."""
        return sum(self.named.values()) + self.unnamed

    def add(self, reasons: Iterable[str]) -> None:
        """Add one reason per sample, as in `MicroBatch.skipped`."""
        for reason in reasons:
            self._count(reason, 1)

    def merge(self, named: Mapping[str, int], unnamed: int) -> None:
        """Add those of another rank."""
        for reason, samples in named.items():
            self._count(reason, samples)
        self.unnamed += unnamed

    def lines(self) -> list[str]:
        """Lines for the log: records with the most samples first, and how many samples are not shown."""
        worst = sorted(self.named.items(), key=lambda item: (-item[1], item[0]))
        lines = [f"{samples} samples: {reason}" for reason, samples in worst[:MAX_SHOWN]]
        rest = self.num_samples - sum(samples for _, samples in worst[:MAX_SHOWN])
        return [*lines, f"{rest} samples of other records"] if rest else lines

    def _count(self, reason: str, samples: int) -> None:
        reason = reason[:_MAX_TEXT]
        if reason in self.named or len(self.named) < MAX_NAMED:
            self.named[reason] = self.named.get(reason, 0) + samples
        else:
            self.unnamed += samples


def gathered(skipped: Skipped, ranks: Ranks) -> Skipped:
    """Those of all ranks; every rank calls it."""
    found = Skipped()
    for named, unnamed in gather_json([skipped.named, skipped.unnamed], ranks):
        found.merge(named, unnamed)
    return found
