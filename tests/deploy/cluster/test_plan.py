"""Slots of the cluster -> what each node runs."""

from __future__ import annotations

import re

import pytest

from deploy.cluster.plan import NodePlan, does_not_fit, place, restart_pause_s, slots_per_node
from stoker_proto.config.placement import Placement, parse_slots
from stoker_proto.errors import ConfigError


def placement(trainer: str, dataloader: str = "") -> Placement:
    return Placement(trainer=parse_slots(trainer, "trainer"), dataloader=parse_slots(dataloader, "dataloader"))


def test_slots_count_over_the_cluster_in_node_order() -> None:
    """The page's placement on two nodes of four GPUs: one trains, the other loads."""
    asked = placement("0-3", "4-7")
    assert slots_per_node(asked, 2, [4, 0, 4]) == 4
    assert place(asked, 2, 4, has_gpus=True) == (
        NodePlan(ranks=(0, 1, 2, 3), devices=(0, 1, 2, 3)),
        NodePlan(loaders=(0, 1, 2, 3)),
    )


def test_ranks_are_numbered_by_slot_and_take_the_device_of_their_slot() -> None:
    assert place(placement("2-5", "0,1"), 2, 4, has_gpus=True) == (
        NodePlan(ranks=(0, 1), devices=(2, 3), loaders=(0, 1)),
        NodePlan(ranks=(2, 3), devices=(0, 1)),
    )


def test_without_gpus_the_slots_are_shared_out() -> None:
    asked = placement("0-1", "2-4")
    assert slots_per_node(asked, 3, [0, 0, 0]) == 2
    assert place(asked, 3, 2, has_gpus=False) == (
        NodePlan(ranks=(0, 1)),
        NodePlan(loaders=(0, 1)),
        NodePlan(loaders=(2,)),
    )


@pytest.mark.parametrize(
    ("num_nodes", "gpus", "message"),
    [
        (
            2,
            [4, 0, 0],
            "cluster.num_nodes is 2, and the GPUs of the cluster's nodes are [4, 0, 0]: slots count over nodes",
        ),
        (2, [4, 8], "cluster.num_nodes is 2, and the GPUs of the cluster's nodes are [4, 8]: slots count over nodes"),
        (1, [4], "cluster.component_placement names slot 7: 1 nodes of 4 GPUs have slots 0 to 3"),
    ],
)
def test_gpus_that_are_not_there(num_nodes: int, gpus: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        slots_per_node(placement("0-3", "4-7"), num_nodes, gpus)


def test_a_node_without_slots_and_a_run_without_ranks() -> None:
    with pytest.raises(ConfigError, match=r"no slot of component_placement lies on node 1 \(slots 4 to 7\)"):
        place(placement("0-3", "0-3"), 2, 4, has_gpus=True)
    with pytest.raises(ConfigError, match=r"component_placement\.trainer is empty"):
        place(placement("", "0-3"), 1, 4, has_gpus=True)


def test_restarts_of_a_loader_have_pauses_that_grow_to_a_minute() -> None:
    assert [restart_pause_s(number) for number in range(1, 11)] == [2, 4, 8, 16, 32, 60, 60, 60, 60, 60]


def test_what_a_node_must_have_free() -> None:
    both = NodePlan(ranks=(0, 1), devices=(0, 1), loaders=(0, 1, 2))
    assert both.resources(4, "stoker_data") == {"CPU": 14.0, "GPU": 2.0, "stoker_data": 1.0}
    assert NodePlan(ranks=(0,)).resources(4, "stoker_data") == {"CPU": 1.0}
    text = does_not_fit([{"CPU": 14.0, "GPU": 2.0}], [("10.0.0.1", {"CPU": 8.0, "memory": 1e9, "node:10.0.0.1": 1.0})])
    assert text == (
        "the placement does not fit. Asked, each on a node of its own: 14 CPU, 2 GPU. The cluster has 10.0.0.1: 8 CPU"
    )
