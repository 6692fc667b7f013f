"""The ranks, and every collective operation of the trainer.

Every rank must call each of these functions, in the same order; all ranks get the same result. DeepSpeed's own collectives,
inside an engine, are not here, and `zero` joins and leaves the process group.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from stoker_proto.hashing import key64

MAX_TEXT_BYTES = 4096
"""Of a text that the first rank sends to all; the rest of a longer one is cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Which of the training processes this one is."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the one rank that writes logs and files."""
        return self.rank == 0

    @property
    def is_first_of_machine(self) -> bool:
        """Whether this is the one rank of its machine that acts for the machine."""
        return self.local_rank == 0


def wait_for_all_ranks() -> None:
    """Return when every rank has called this."""
    dist.barrier()


def sum_over_ranks(values: Sequence[float], ranks: Ranks) -> list[float]:
    """Elementwise sums, in float64 (exact for counts below 2**53)."""
    return _reduce(values, dist.ReduceOp.SUM, ranks)


def max_over_ranks(values: Sequence[float], ranks: Ranks) -> list[float]:
    """Elementwise maxima."""
    return _reduce(values, dist.ReduceOp.MAX, ranks)


def sum_tensor(tensor: torch.Tensor) -> None:
    """In place: elementwise sums over the ranks. The host does not wait for them."""
    dist.all_reduce(tensor, op=dist.ReduceOp.SUM)


def max_tensor(tensor: torch.Tensor) -> None:
    """In place: elementwise maxima over the ranks. The host does not wait for them."""
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)


def range_over_ranks(found: tuple[int, int] | None, ranks: Ranks) -> tuple[int, int] | None:
    """(smallest, largest) number over the ranges of all ranks; None if no rank has a range. Numbers are 0 or more."""
    least, most = found or (np.inf, -np.inf)
    lowest, highest = max_over_ranks([-least, most], ranks)
    return None if highest < 0 else (int(-lowest), int(highest))


def find_differences(values: Mapping[str, str], ranks: Ranks) -> list[str] | None:
    """None if all ranks have the same values. Otherwise names that differ; empty if ranks have different numbers of names."""
    names = sorted(values)
    keys = [key64(name, values[name]) >> 1 for name in names]  # >> 1: inside int64
    least = torch.tensor([len(names), *keys], dtype=torch.int64, device=ranks.device)
    most = least.clone()
    dist.all_reduce(least[:1], op=dist.ReduceOp.MIN)
    dist.all_reduce(most[:1], op=dist.ReduceOp.MAX)
    if least[0] != most[0]:
        return []
    dist.all_reduce(least, op=dist.ReduceOp.MIN)  # equally many names everywhere, so the tensors have one shape
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    differing = [name for name, low, high in zip(names, least[1:], most[1:], strict=True) if low != high]
    return differing or None


def text_of_first_rank(text: str, ranks: Ranks) -> str:
    """What the first rank passed as `text`, without spaces at its end; the other ranks' texts do not matter."""
    content = bytearray(text.encode()[:MAX_TEXT_BYTES].ljust(MAX_TEXT_BYTES))
    message = torch.frombuffer(content, dtype=torch.uint8).to(ranks.device)
    dist.broadcast(message, src=0)
    return bytes(message.tolist()).decode(errors="replace").rstrip()


def json_of_first_rank(value: Any, ranks: Ranks) -> Any:
    """What the first rank passed as `value`, through JSON; the other ranks' values do not matter."""
    if ranks.world_size == 1:
        return json.loads(json.dumps(value))
    text = json.dumps(value).encode() if ranks.is_first else b""
    length = torch.tensor([len(text)], dtype=torch.int64, device=ranks.device)
    dist.broadcast(length, src=0)
    content = bytearray(text) if ranks.is_first else bytearray(int(length))
    message = torch.frombuffer(content, dtype=torch.uint8).to(ranks.device)
    dist.broadcast(message, src=0)
    return json.loads(bytes(message.tolist()))


def gather_json(value: Any, ranks: Ranks) -> list[Any]:
    """The values of all ranks, by rank. They travel as JSON in byte tensors; nothing is unpickled."""
    if ranks.world_size == 1:
        return [json.loads(json.dumps(value))]
    text = json.dumps(value).encode()
    length = torch.tensor([len(text)], dtype=torch.int64, device=ranks.device)
    dist.all_reduce(length, op=dist.ReduceOp.MAX)
    padded = text.ljust(int(length))  # with spaces, which JSON allows
    mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(ranks.device)
    gathered = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(gathered, mine)
    return [json.loads(bytes(tensor.tolist())) for tensor in gathered]


def _reduce(values: Sequence[float], operation: dist.ReduceOp.RedOpType, ranks: Ranks) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor, op=operation)
    found: list[float] = tensor.tolist()
    return found
