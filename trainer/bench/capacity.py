"""How many loaders, cores and what network a run needs: a cost model with five figures, fitted to a short measurement. Pure.

    samples/s of n loaders and w ranks = min(n x one loader x balance, w x one rank)

One loader: what a measured one gave, if loaders were the limit then; else what its threads could give by their CPU time.
One rank: what a rank took from a null loader.
Balance: lanes of the stream are shared out whole, so 5 loaders of 32 lanes wait for the one with 7: 32 / (5 x 7) = 91%; loaders
beyond the number of lanes are idle. At the start of a run's first epoch lanes begin one after another, which balances less.
Loaders, cores and networks are planned to be busy for at most `BUSY` of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

BUSY = 0.8
"""Share of its capacity that a plan uses of each part."""
FRAMING = 1.05
"""Bytes on the wire for each byte of a message: Ethernet, IP and TCP headers at 1,500 bytes."""
NICS_GBIT = (1, 10, 25, 40, 100, 200, 400)
_LIMIT_SHARE = 0.5
"""Ranks that waited for more of the time than this were limited by the loaders."""
_FULL = 0.85
"""A host that was busier than this limits what runs on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Figures of one pull at full speed."""

    samples_per_s: float
    """In the last half of the steps."""
    num_loaders: int
    num_threads: int
    """Of all loaders."""
    loader_cpu_ms: float
    """Per sample, all processes of the loaders."""
    client_cpu_ms: float
    wire_bytes: float
    """Per sample."""
    wait_share: float
    """Of the time that the worst rank waited, in the last half of the steps."""
    host_busy: float
    """Share of this host's cores that were busy, whatever ran on them."""
    loaders_here: bool
    """The loaders use the same cores as the ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The fitted figures."""

    loader_samples_per_s: float
    loader_limit: Literal["cores", "pace", "estimate"]
    """`cores`: its threads were busy; `pace`: they were not, so something else limits it: a disk, a network, a CPU quota;
    `estimate`: the loaders were not the limit, so it follows from their CPU time."""
    loader_threads: float
    """Of one loader."""
    rank_samples_per_s: float
    loader_cpu_ms: float
    client_cpu_ms: float
    wire_bytes: float
    lanes: int
    """Of the stream, over all entries of the data paths."""

    def samples_per_s(self, num_loaders: int, num_ranks: int) -> float:
        """What so many loaders give so many ranks that have enough open tickets."""
        busiest = math.ceil(self.lanes / num_loaders)
        return min(self.loader_samples_per_s * self.lanes / busiest, num_ranks * self.rank_samples_per_s)

    def loaders_for(self, samples_per_s: float) -> int | None:
        """The fewest loaders that give this at `BUSY`; None: the stream has too few lanes for any number of them."""
        share = BUSY * self.loader_samples_per_s / samples_per_s  # of the stream that one loader can make
        most = math.floor(self.lanes * share)  # lanes of one loader
        return math.ceil(self.lanes / most) if most else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a run needs."""

    gpus: int
    samples_per_s: float
    loaders: int
    loader_cores: int
    """Cores that the loaders keep busy, at `BUSY`; their `loaders` x threads where something else limits them."""
    network_gbit: float
    """Of the whole run."""
    node_gbit: float
    """Into a node with GPUs."""
    node_nic_gbit: int | None
    """The smallest of `NICS_GBIT`; None: one is not enough."""
    loader_gbit: float
    loader_nic_gbit: int | None
    client_cores_per_node: float
    memory_gb: float
    """Of all loaders, above what idle ones take."""
    binds: str
    """What limits this run first."""


def fit(measured: Measured, rank_samples_per_s: float, *, lanes: int) -> Model:
    """rank_samples_per_s: what one rank took from a null loader. lanes: of the stream, over all entries."""
    one = measured.samples_per_s / measured.num_loaders
    threads = measured.num_threads / measured.num_loaders
    by_cpu = 1e3 * threads / measured.loader_cpu_ms if measured.loader_cpu_ms else math.inf
    host_limits = measured.loaders_here and measured.host_busy >= _FULL
    limit: Literal["cores", "pace", "estimate"] = "estimate"
    if one >= BUSY * by_cpu:
        limit = "cores"
    elif measured.wait_share >= _LIMIT_SHARE and not host_limits:
        limit = "pace"
    return Model(
        loader_samples_per_s=by_cpu if limit == "estimate" else one,
        loader_limit=limit,
        loader_threads=threads,
        rank_samples_per_s=rank_samples_per_s,
        loader_cpu_ms=measured.loader_cpu_ms,
        client_cpu_ms=measured.client_cpu_ms,
        wire_bytes=measured.wire_bytes,
        lanes=lanes,
    )


def need(model: Model, gpus: int, rate: float, *, gpus_per_node: int, loader_memory_gb: float) -> Need:
    """rate: samples/s of one GPU. loader_memory_gb: of one loader."""
    samples_per_s = gpus * rate
    by_lanes = model.loaders_for(samples_per_s)
    loaders = by_lanes or math.ceil(samples_per_s / (BUSY * model.loader_samples_per_s))
    cores = math.ceil(samples_per_s * model.loader_cpu_ms / 1e3 / BUSY)
    if model.loader_limit == "pace":
        cores = math.ceil(loaders * model.loader_threads)
    on_node = min(gpus, gpus_per_node) * rate
    node_gbit, loader_gbit = _gbit(model, on_node), _gbit(model, samples_per_s / loaders)
    node_nic = nic(node_gbit)
    return Need(
        gpus=gpus,
        samples_per_s=samples_per_s,
        loaders=loaders,
        loader_cores=cores,
        network_gbit=_gbit(model, samples_per_s),
        node_gbit=node_gbit,
        node_nic_gbit=node_nic,
        loader_gbit=loader_gbit,
        loader_nic_gbit=nic(loader_gbit),
        client_cores_per_node=on_node * model.client_cpu_ms / 1e3,
        memory_gb=loaders * loader_memory_gb,
        binds=_binds(model, rate, node_nic, enough_lanes=by_lanes is not None),
    )


def nic(gbit: float) -> int | None:
    """The smallest network card that carries this at `BUSY`, in Gbit/s."""
    return next((size for size in NICS_GBIT if gbit <= BUSY * size), None)


def _gbit(model: Model, samples_per_s: float) -> float:
    return samples_per_s * model.wire_bytes * 8 * FRAMING / 1e9


def _binds(model: Model, rate: float, node_nic: int | None, *, enough_lanes: bool) -> str:
    if rate > BUSY * model.rank_samples_per_s:
        return (
            f"the client: one rank takes {model.rank_samples_per_s:.0f} samples/s at most; more loaders do not help, but more "
            "--decode-threads, data.image.transport: pixels, or smaller images do"
        )
    if node_nic is None:
        return "the network into a node: data.image.transport: jpeg, a lower quality or more nodes help"
    if not enough_lanes:
        return (
            f"the lanes: the stream has {model.lanes}, and more loaders than lanes are idle; a larger data.order.lanes (it "
            "changes the order of the samples) or more threads per loader help"
        )
    if model.loader_limit == "pace":
        return "the pace of the loaders, not their cores: look at their disk, their network and CPU quotas"
    return "the cores of the loaders"
