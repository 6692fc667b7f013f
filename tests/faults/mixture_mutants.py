"""The core, wrong about what an epoch of several sources is made of."""

from __future__ import annotations

import dataclasses

from stoker_proto.order.mixture import ONE_PASS, MixedOrder
from stoker_proto.order.stream import Pass
from tests.faults.substitutes import with_epochs, with_tickets
from tests.faults.trainer import MakeCore
from trainer.feed.client.epochs import Epochs
from trainer.feed.client.options import CoreOptions
from trainer.feed.client.schedule import Slice
from trainer.feed.client.tickets import Tickets


class _EpochForPass(Tickets):
    """Tickets name the epoch where they should name the pass."""

    def add(self, slice_: Slice) -> None:
        runs = tuple(dataclasses.replace(run, epoch=slice_.epoch) for run in slice_.runs)
        super().add(dataclasses.replace(slice_, runs=runs))


class _WeightsIgnored(Epochs):
    """One pass over everything, whatever was asked for."""

    def __init__(self, options: CoreOptions) -> None:
        super().__init__(dataclasses.replace(options, weights=()))


class _WholePasses(Epochs):
    """Rates are rounded up to whole passes."""

    def _find_rates(self) -> list[int]:
        return [-(-rate // ONE_PASS) * ONE_PASS for rate in super()._find_rates()]


class _PassesBeginAnew(Epochs):
    """Every epoch begins each source at its first pass; what the one before left of a pass is never trained."""

    def _made_of(self, epoch: int) -> list[Pass]:
        return super()._made_of(0)

    def _mix(self, epoch: int) -> MixedOrder:
        return super()._mix(0)


class _OneAfterTheOther(Epochs):
    """Sources are not mixed: each is trained to its end before the next begins."""

    def _mix(self, epoch: int) -> MixedOrder:
        order = super()._mix(epoch)
        return MixedOrder(order._sources, order._lanes, 1 << 20)


MIXTURE_MUTANTS: dict[str, MakeCore] = {
    "epoch-for-pass": with_tickets(_EpochForPass),
    "weights-ignored": with_epochs(_WeightsIgnored),
    "whole-passes": with_epochs(_WholePasses),
    "passes-begin-anew": with_epochs(_PassesBeginAnew),
    "one-source-after-the-other": with_epochs(_OneAfterTheOther),
}
"""Name -> what stands in for the core."""
