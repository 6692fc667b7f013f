"""Where the ranks of one machine listen: on its loopback, and nowhere else."""

from __future__ import annotations

import ipaddress
import os

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.trainer.support.ranks import run_ranks


def _meet_and_look(rank: int) -> tuple[list[str], float]:
    from trainer.engine.zero import join_ranks, leave_ranks

    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)
    assert join_ranks().rank == rank
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value)  # connects the pairs
    listening = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    dist.barrier()
    leave_ranks()
    return listening, float(value)


@pytest.mark.process
def test_ranks_of_one_machine_listen_on_the_loopback_alone() -> None:
    (first, first_sum), (second, second_sum) = run_ranks(2, _meet_and_look)
    assert (first_sum, second_sum) == (3.0, 3.0)
    assert first, "rank 0 listens for the others"
    assert [address for address in first + second if not ipaddress.ip_address(address).is_loopback] == []
